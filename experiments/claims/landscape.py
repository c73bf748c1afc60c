"""Batch normalization smooths the landscape of the loss, and does not need steady inputs for it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from bnjax import diagnostics, initializers, models, norms
from bnjax.diagnostics import Variables
from bnjax.paired import Arm
from bnjax.training import Batch
from experiments.claims import LABELS, Check, Claim, Evidence, Settings, collect, draw_lines
from experiments.claims.grids import accuracy, look_into, stack
from experiments.lab.scratch import head, train

RATE, BATCH, EXAMPLES = 0.1, 100, 10_000
STEP_SIZES = tuple(float(size) for size in RATE * np.linspace(0.5, 4, 8))


class NoisyBatchNorm(nn.Module):
    """Batch normalization, and in training noise whose distribution changes with every step.

        y = s x + m,   s ~ N(sigma, 0.1),   m ~ U(mu - 0.1, mu + 0.1) for each value,
        sigma ~ U(1, 1.25),   mu ~ U(-0.5, 0.5) for each unit and step; their means in evaluation

    Source: Santurkar et al. (2018), section 2.1 and appendix A.
    """

    train: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalizes `x`, `[N, H]`, and adds the noise."""
        x = norms.norm("batch")(self.train)(x)
        if not self.train:
            return 1.125 * x
        keys = jax.random.split(self.make_rng("dropout"), 4)
        unit = (1, x.shape[1])
        sigma = jax.random.uniform(keys[0], unit, x.dtype, 1.0, 1.25)
        mu = jax.random.uniform(keys[1], unit, x.dtype, -0.5, 0.5)
        s = sigma + 0.1 * jax.random.normal(keys[2], x.shape, x.dtype)
        m = mu + jax.random.uniform(keys[3], x.shape, x.dtype, -0.1, 0.1)
        return s * x + m


NORMS: dict[str, Any] = {"bn": "batch", "no_bn": None, "noisy_bn": NoisyBatchNorm}
NETWORKS = {
    name: models.MLP((64,) * 10, 10, norm, kernel_init=initializers.he_normal)
    for name, norm in NORMS.items()
}


def run(settings: Settings) -> Evidence:
    """Variation of loss and gradient along the gradient, while the networks train."""
    keys = settings.keys(3, 10)
    data, epochs = settings.data(EXAMPLES), settings.either(10, 30)
    arms = [Arm(name, network, optax.sgd(RATE)) for name, network in NETWORKS.items()]
    training = train(arms, keys, *data, epochs=epochs, batch_size=BATCH)
    twins, probe = {arm: NETWORKS[arm] for arm in LABELS}, head(data[0], 500)
    accuracies, varied = stack(
        (accuracy(epoch), look_into(_vary, twins, epoch.states, probe)) for epoch in training
    )  # [R, epochs]
    last = {arm: values[:, -1] for arm, values in accuracies.items()}
    gains = [last["noisy_bn"] - last[arm] for arm in ("no_bn", "bn")]
    ratios = [_ratio(*both) for both in zip(varied["bn"], varied["no_bn"], strict=True)]
    titles = ("Variation of the loss in nats", "Change of the gradient")
    panels = {title: {arm: varied[arm][k] for arm in LABELS} for k, title in enumerate(titles)}
    return collect(CLAIM.checks, [*ratios, *gains], panels)


def _vary(model: nn.Module, variables: Variables, batch: Batch) -> tuple[Array, Array]:
    """Range of the loss and largest change of the gradient."""
    found = diagnostics.landscape(model, variables, batch, step_sizes=STEP_SIZES)
    return jnp.ptp(found["losses"]), found["gradient_distances"].max()


def _ratio(bn: np.ndarray, no_bn: np.ndarray) -> np.ndarray:
    """Of the means over the epochs in which both are finite: a network may diverge."""
    both = np.isfinite(bn) & np.isfinite(no_bn)
    return np.mean(bn, axis=-1, where=both) / np.mean(no_bn, axis=-1, where=both)


CLAIM = Claim(
    id="landscape",
    statement="Along the gradient, loss and gradient change less with batch normalization; and "
    "noise that unsteadies what it steadied does not undo its good.",
    source="Santurkar et al., How does batch normalization help optimization? (2018), figures 2 "
    "and 4",
    setup=f"Ten hidden layers of 64, ReLU, He's initialization, SGD {RATE}, batches of {BATCH}, "
    f"{EXAMPLES:,} training images, 30 epochs (quick: 10). After each, steps of 0.5 to 4 times the "
    "rate along the gradient of 500 training images: the range of the loss and the largest change "
    "of the gradient, averaged over the epochs in which both are finite. The paper's noise follows "
    "each normalization: shifts of up to 0.6 standard deviations and scales of 1 to 1.25, drawn "
    "anew for each unit and step. The paper trains VGG on CIFAR-10.",
    checks=(
        Check("range of the loss, ratio with BN to without", "below 1", high=1.0),
        Check("change of the gradient, ratio with BN to without", "below 1", high=1.0),
        Check("test accuracy, noisy BN minus no BN, points", "above 0", low=0.0),
        Check("test accuracy, noisy BN minus BN, points", "about 0", low=-1.0),
    ),
    seconds=(25, 140),
    run=run,
    draw=draw_lines(xlabel="epoch", yscale="log"),
)

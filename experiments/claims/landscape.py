"""Batch normalization smooths the landscape of the loss, and does not need steady inputs for it."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure

from bnjax import diagnostics, initializers, models, norms
from bnjax.paired import Arm
from bnjax.training import Batch
from experiments.claims import LABELS, Check, Claim, Evidence, Settings, collect, draw_arms
from experiments.claims.grids import accuracy
from experiments.lab.scratch import head, train
from experiments.report import figures

RATE, BATCH, EXAMPLES = 0.1, 100, 10_000
STEP_SIZES = tuple(float(size) for size in RATE * np.linspace(0.5, 4, 8))
WHAT = {"loss": "Variation of the loss", "gradient": "Change of the gradient"}


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
    varied: list[dict[str, np.ndarray]] = []
    for epoch in train(arms, keys, *data, epochs=epochs, batch_size=BATCH):
        states, probe = epoch.states, head(data[0], 500)
        varied.append({arm: np.array(_vary(arm, states[arm].variables, probe)) for arm in LABELS})
    found = {arm: np.stack([one[arm] for one in varied], axis=-1) for arm in LABELS}
    last = accuracy(epoch)
    gains = [last["noisy_bn"] - last[arm] for arm in ("no_bn", "bn")]
    picture = {arm: dict(zip(WHAT, both, strict=True)) for arm, both in found.items()}
    return collect(CLAIM.checks, [*_ratio(found["bn"], found["no_bn"]), *gains], picture)


@partial(jax.jit, static_argnums=0)
def _vary(arm: str, variables: diagnostics.Variables, batch: Batch) -> tuple[Array, Array]:
    """Range of the loss and largest change of the gradient, `[R]` each."""

    def vary(variables: diagnostics.Variables) -> tuple[Array, Array]:
        found = diagnostics.landscape(NETWORKS[arm], variables, batch, step_sizes=STEP_SIZES)
        return jnp.ptp(found["losses"]), found["gradient_distances"].max()

    return jax.lax.map(vary, variables)


def _ratio(bn: np.ndarray, no_bn: np.ndarray) -> np.ndarray:
    """Of the means over the epochs in which both are finite: a network may diverge."""
    both = np.isfinite(bn) & np.isfinite(no_bn)
    return np.mean(bn, axis=-1, where=both) / np.mean(no_bn, axis=-1, where=both)


def draw(evidence: Evidence) -> Figure:
    """Both variations over training."""
    figure, row = figures.panels(list(WHAT.values()), width=5)
    for axes, what in zip(row, WHAT, strict=True):
        by_arm = {arm: found[what] for arm, found in evidence.picture.items()}
        epochs = range(1, 1 + len(by_arm["bn"][0]))
        draw_arms(axes, epochs, by_arm, xlabel="epoch", yscale="log")
    row[0].set_ylabel("nats, log scale")
    row[1].set_ylabel("Euclidean norm, log scale")
    return figure


CLAIM = Claim(
    id="landscape",
    statement="Along the gradient, loss and gradient change less with batch normalization; and "
    "noise that unsteadies what it steadied does not undo its good.",
    source="Santurkar et al., How does batch normalization help optimization? (2018), figures 2 "
    "and 4",
    setup=f"Ten hidden layers of 64, ReLU, He's initialization, SGD {RATE}, batches of {BATCH}, "
    f"{EXAMPLES:,} training images, 30 epochs (quick: 10). After each, steps of 0.5 to 4 times the "
    "rate along the gradient of 500 training images. The paper's noise follows each normalization: "
    "shifts of up to 0.6 standard deviations and scales of 1 to 1.25, drawn anew for each unit and "
    "step. The paper trains VGG on CIFAR-10.",
    criterion="Means over replicates: range of the loss and largest change of the gradient, "
    "averaged over the epochs in which both are finite, are smaller with batch normalization; "
    "test accuracy with noise is higher than without batch normalization, and at most 1 point "
    "lower than with it.",
    checks=(
        Check("range of the loss, ratio with BN to without", "below 1", high=1.0),
        Check("change of the gradient, ratio with BN to without", "below 1", high=1.0),
        Check("test accuracy, noisy BN minus no BN, points", "above 0", low=0.0),
        Check("test accuracy, noisy BN minus BN, points", "about 0", low=-1.0),
    ),
    seconds=(25, 140),
    run=run,
    draw=draw,
)

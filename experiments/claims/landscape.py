"""Batch normalization smooths the landscape of the loss, and does not need steady inputs for it."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure

from bnjax import diagnostics, initializers, models, norms, paired
from bnjax.norms import Norm
from bnjax.paired import Arm
from bnjax.training import Batch
from experiments.claims import STYLES, Check, Claim, Evidence, Settings, measured
from experiments.lab.grids import accuracy, take, train
from experiments.report import figures

RATE, BATCH, EXAMPLES = 0.1, 100, 10_000
STEP_SIZES = tuple(float(size) for size in RATE * np.linspace(0.5, 4, 8))
HELD = ("bn", "no_bn")


class NoisyBatchNorm(nn.Module):
    """Batch normalization, and in training noise whose distribution changes with every step.

        y = s x + m,   s ~ N(sigma, 0.1),   m ~ U(mu - 0.1, mu + 0.1) for each value,
        sigma ~ U(1, 1.25),   mu ~ U(-0.5, 0.5) for each unit and step; their means in evaluation

    Source: Santurkar et al. (2018), section 2.1 and appendix A.
    """

    use_running_average: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalizes `x`, `[N, H]`, and adds the noise."""
        x = norms.norm("batch")(not self.use_running_average)(x)
        if self.use_running_average:
            return 1.125 * x
        keys = jax.random.split(self.make_rng("dropout"), 4)
        unit = (1, x.shape[1])
        sigma = jax.random.uniform(keys[0], unit, x.dtype, 1.0, 1.25)
        mu = jax.random.uniform(keys[1], unit, x.dtype, -0.5, 0.5)
        s = sigma + 0.1 * jax.random.normal(keys[2], x.shape, x.dtype)
        m = mu + jax.random.uniform(keys[3], x.shape, x.dtype, -0.1, 0.1)
        return s * x + m


def _noisy(train: bool) -> nn.Module:
    return NoisyBatchNorm(use_running_average=not train)


NORMS: dict[str, str | Norm | None] = {"bn": "batch", "no_bn": None, "noisy_bn": _noisy}


def run(settings: Settings) -> Evidence:
    """Variation of loss and gradient along the gradient, while the networks train."""
    keys = paired.replicate_keys(settings.seed, settings.count(3, 10))
    examples = take(settings.train, EXAMPLES)
    probe = take(examples, 500)
    optimizer = optax.sgd(RATE)
    networks = {name: _network(norm) for name, norm in NORMS.items()}
    by_epoch: list[dict[str, tuple[Array, Array]]] = []
    for epoch in train(
        [Arm(name, network, optimizer) for name, network in networks.items()],
        keys,
        examples,
        settings.test,
        epochs=settings.either(10, 30),
        batch_size=BATCH,
    ):
        by_epoch.append(
            {arm: _vary(networks[arm], epoch.states[arm].variables, probe) for arm in HELD}
        )
    last = accuracy(epoch)
    by_arm = {
        arm: {
            what: np.stack([found[arm][k] for found in by_epoch], axis=1)
            for k, what in enumerate(("loss", "gradient"))
        }
        for arm in HELD
    }  # [R, epochs]
    values = (
        *(_ratio(by_arm["bn"][what], by_arm["no_bn"][what]) for what in by_arm["bn"]),
        last["noisy_bn"] - last["no_bn"],
        last["noisy_bn"] - last["bn"],
    )
    picture = {arm: {k: v.tolist() for k, v in found.items()} for arm, found in by_arm.items()}
    return Evidence(measured(CLAIM.checks, values), picture)


def _network(norm: str | Norm | None) -> models.MLP:
    return models.MLP((64,) * 10, 10, norm, kernel_init=initializers.he_normal)


@partial(jax.jit, static_argnums=0)
def _vary(model: models.MLP, variables: diagnostics.Variables, batch: Batch) -> tuple[Array, Array]:
    """Range of the loss and largest change of the gradient, `[R]` each."""

    def vary(variables: diagnostics.Variables) -> tuple[Array, Array]:
        found = diagnostics.landscape(model, variables, batch, step_sizes=STEP_SIZES)
        return jnp.ptp(found["losses"]), found["gradient_distances"].max()

    return jax.lax.map(vary, variables)


def _ratio(bn: np.ndarray, no_bn: np.ndarray) -> np.ndarray:
    """Of the means over the epochs in which both are finite: a network may diverge."""
    both = np.isfinite(bn) & np.isfinite(no_bn)
    return np.mean(bn, axis=1, where=both) / np.mean(no_bn, axis=1, where=both)


def draw(evidence: Evidence) -> Figure:
    """Both variations over training."""
    titles = {"loss": "Variation of the loss", "gradient": "Change of the gradient"}
    figure, row = figures.panels(list(titles.values()), width=5)
    for axes, what in zip(row, titles, strict=True):
        for arm, found in evidence.picture.items():
            epochs = range(1, len(found[what][0]) + 1)
            figures.draw_band(axes, STYLES[arm], epochs, found[what], marker="")
        axes.set_xlabel("epoch")
        axes.set_yscale("log")
        axes.legend(frameon=False)
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

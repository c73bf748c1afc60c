"""Batch normalization makes gradients explode with depth at initialization."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from bnjax import diagnostics, initializers, models, paired
from experiments.claims import STYLES, Check, Claim, Evidence, Settings, around, measured
from experiments.lab.grids import take
from experiments.report import figures

DEPTH, WIDTH = 30, 1000
LAYERS = slice(4, 26)  # the fifth to the 26th
LIMIT = math.pi / (math.pi - 1)
PUBLISHED = {32: 1.522, 128: 1.480, 512: LIMIT}


def run(settings: Settings) -> Evidence:
    """Growth of the squared gradient norm per layer, and the norms of the first replicate."""
    width = settings.either(500, WIDTH)
    keys = paired.replicate_keys(settings.seed, settings.count(3, 5))

    def make(norm: str | None) -> tuple[models.MLP, Callable]:
        he = initializers.he_normal
        model = models.MLP((width,) * DEPTH, 10, norm, kernel_init=he)
        return model, jax.jit(lambda key: model.init(key, jnp.zeros((2, 784)), train=True))

    made = {True: make("batch"), False: make(None)}

    def measure(name: str) -> list[list[float]]:
        model, init = made[name != "no_bn"]
        batch = take(settings.train, 128 if name == "no_bn" else int(name))
        norms = jax.jit(partial(diagnostics.backpropagated_norms, model))
        by_key = [norms(init(key), batch) for key in keys]
        return [[float(one[f"Dense_{k}"]) ** 2 for k in range(DEPTH)] for one in by_key]

    squares = {name: measure(name) for name in (*map(str, PUBLISHED), "no_bn")}
    growth = [[_growth(norms) for norms in found] for found in squares.values()]
    first = {name: found[0] for name, found in squares.items()}
    return Evidence(measured(CLAIM.checks, growth), first)


def _growth(squares: list[float]) -> float:
    """Towards the input, per layer: the slope of the logarithm over the middle layers."""
    layers = np.arange(DEPTH)[LAYERS]
    return float(np.exp(-np.polyfit(layers, np.log(squares[LAYERS]), 1)[0]))


def draw(evidence: Evidence) -> Figure:
    """Squared gradient norm by layer."""
    figure, (axes,) = figures.panels(["Squared gradient norm at initialization"], width=7)
    for name, style in zip(evidence.picture, ("-", "--", ":", "-"), strict=True):
        label = "without BN" if name == "no_bn" else f"with BN, batch of {name}"
        color = STYLES["no_bn" if name == "no_bn" else "bn"]["color"]
        axes.semilogy(range(1, DEPTH + 1), evidence.picture[name], style, color=color, label=label)
    axes.set_xlabel("layer, from the input on")
    axes.set_ylabel("of what leaves the layer, log scale")
    axes.legend(frameon=False)
    return figure


CLAIM = Claim(
    id="gradient-explosion-at-init",
    statement="At initialization, batch normalization with ReLU makes the squared gradient norm "
    "grow by the same factor in every layer on its way back: pi / (pi - 1) for large batches.",
    source="Yang et al., A mean field theory of batch normalization (2019), theorems 5 and 8",
    setup=f"{DEPTH} hidden layers of {WIDTH} (quick: 500), ReLU, He's initialization, training "
    "images; the growth is the slope over layers 5 to 26 of the gradient in what leaves each "
    "Dense layer.",
    criterion="The mean growth per layer is within 3 % of theory for batches of 32, 128 and 512, "
    "and within 3 % of 1 without batch normalization.",
    checks=(
        *(
            around(f"growth per layer, batch of {size}", growth, 0.03 * growth)
            for size, growth in PUBLISHED.items()
        ),
        Check("growth per layer, without BN", "about 1", 0.97, 1.03),
    ),
    seconds=(18, 25),
    run=run,
    draw=draw,
)

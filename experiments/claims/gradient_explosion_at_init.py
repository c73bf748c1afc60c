"""Batch normalization makes gradients explode with depth at initialization."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from bnjax import diagnostics, initializers, models
from experiments.claims import STYLES, Check, Claim, Evidence, Settings, around, collect
from experiments.report import figures

DEPTH, WIDTH = 30, 1000
LAYERS = slice(4, 26)  # the fifth to the 26th
LIMIT = math.pi / (math.pi - 1)
PUBLISHED = {32: 1.522, 128: 1.480, 512: LIMIT}


def run(settings: Settings) -> Evidence:
    """Growth of the squared gradient norm per layer, and the norms of the first replicate."""
    width = settings.either(500, WIDTH)
    keys = settings.keys(3, 5)

    def measure(norm: str | None, size: int) -> np.ndarray:
        model = models.MLP((width,) * DEPTH, 10, norm, kernel_init=initializers.he_normal)
        batch, _ = settings.data(size)

        @jax.jit
        def probe(key: jax.Array) -> jax.Array:
            variables = model.init(key, jnp.zeros((2, 784)), train=True)
            by_layer = diagnostics.backpropagated_norms(model, variables, batch)
            return jnp.stack([by_layer[f"Dense_{k}"] for k in range(DEPTH)])

        return np.array([probe(key) for key in keys], np.float64) ** 2  # [R, DEPTH]

    squares = {str(size): measure("batch", size) for size in PUBLISHED}
    squares["no_bn"] = measure(None, 128)
    first = {name: values[0] for name, values in squares.items()}
    return collect(CLAIM.checks, map(_growth, squares.values()), first)


def _growth(squares: np.ndarray) -> np.ndarray:
    """Towards the input, per layer: the slope of the logarithm over the middle layers, `[R]`."""
    layers = np.arange(DEPTH)[LAYERS]
    return np.exp(-np.polyfit(layers, np.log(squares[:, LAYERS]).T, 1)[0])


def draw(evidence: Evidence) -> Figure:
    """Squared gradient norm by layer."""
    figure, (axes,) = figures.panels(["Squared gradient norm at initialization"], width=7)
    for name, style in zip(evidence.picture, ("-", "--", ":", "-"), strict=True):
        label = "without BN" if name == "no_bn" else f"with BN, batch of {name}"
        color = STYLES["no_bn" if name == "no_bn" else "bn"]["color"]
        axes.semilogy(range(1, DEPTH + 1), evidence.picture[name], style, color=color, label=label)
    axes.set(xlabel="layer, from the input on", ylabel="of what leaves the layer, log scale")
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

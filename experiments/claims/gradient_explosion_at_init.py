"""Batch normalization makes gradients explode with depth at initialization."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from bnjax import diagnostics, initializers, models
from experiments.claims import Check, Claim, Evidence, Settings, collect, draw_lines

DEPTH, WIDTH = 30, 1000
LAYERS = slice(4, 26)  # the fifth to the 26th
PUBLISHED = {32: 1.522, 128: 1.480, 512: math.pi / (math.pi - 1)}  # by batch
KINDS = {str(size): f"with BN, batch of {size}" for size in PUBLISHED} | {"no_bn": "without BN"}


def run(settings: Settings) -> Evidence:
    """The squared gradient norm of each layer, and its growth."""
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
    panels = {"Squared norm of the gradient in what leaves a layer": squares}
    return collect(CLAIM.checks, map(_growth, squares.values()), panels)


def _growth(squares: np.ndarray) -> np.ndarray:
    """Towards the input, per layer: the slope of the logarithm over the middle layers, `[R]`."""
    layers = np.arange(DEPTH)[LAYERS]
    return np.exp(-np.polyfit(layers, np.log(squares[:, LAYERS]).T, 1)[0])


CLAIM = Claim(
    id="gradient-explosion-at-init",
    statement="At initialization, batch normalization with ReLU makes the squared gradient norm "
    "grow by the same factor in every layer on its way back: pi / (pi - 1) for large batches.",
    source="Yang et al., A mean field theory of batch normalization (2019), theorems 5 and 8",
    setup=f"{DEPTH} hidden layers of {WIDTH} (quick: 500), ReLU, He's initialization; the "
    "growth is the slope over layers 5 to 26 of the gradient in what leaves each Dense layer.",
    checks=(
        *(
            Check(f"growth per layer, batch of {size}", f"{x:.4g}", x - 0.03 * x, x + 0.03 * x)
            for size, x in PUBLISHED.items()
        ),
        Check("growth per layer, without BN", "about 1", 0.97, 1.03),
    ),
    seconds=(18, 25),
    run=run,
    draw=draw_lines(labels=KINDS, xlabel="layer, from the input on", yscale="log"),
)

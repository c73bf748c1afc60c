"""bnjax: the laboratory for batch normalization in JAX."""

from bnjax import (
    cs231n,
    data,
    diagnostics,
    functional,
    initializers,
    layers,
    models,
    moments,
    norms,
    paired,
    parallel,
    population,
    statistics,
    torch_interop,
    training,
    variants,
)
from bnjax.layers import BatchNorm
from bnjax.version import __version__

__all__ = [
    "BatchNorm",
    "__version__",
    "cs231n",
    "data",
    "diagnostics",
    "functional",
    "initializers",
    "layers",
    "models",
    "moments",
    "norms",
    "paired",
    "parallel",
    "population",
    "statistics",
    "torch_interop",
    "training",
    "variants",
]

"""bnjax: the laboratory for batch normalization in JAX."""

from bnjax import (
    cs231n,
    data,
    diagnostics,
    distributed,
    functional,
    initializers,
    layers,
    models,
    moments,
    paired,
    population,
    relatives,
    statistics,
    torch_interop,
    training,
)
from bnjax.layers import BatchNorm
from bnjax.version import __version__

__all__ = [
    "BatchNorm",
    "__version__",
    "cs231n",
    "data",
    "diagnostics",
    "distributed",
    "functional",
    "initializers",
    "layers",
    "models",
    "moments",
    "paired",
    "population",
    "relatives",
    "statistics",
    "torch_interop",
    "training",
]

"""bnjax: the laboratory for batch normalization in JAX."""

from bnjax import (
    data,
    diagnostics,
    distributed,
    functional,
    initializers,
    models,
    paired,
    statistics,
    training,
)
from bnjax.layers import BatchNorm
from bnjax.version import __version__

__all__ = [
    "BatchNorm",
    "__version__",
    "data",
    "diagnostics",
    "distributed",
    "functional",
    "initializers",
    "models",
    "paired",
    "statistics",
    "training",
]

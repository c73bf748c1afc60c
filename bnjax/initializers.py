"""Initial weights under the names that PyTorch and the literature give them.

An initializer is a function `(key, shape, dtype) -> array`. Kernels are `[fan_in, fan_out]`.
"""

import math
import re
from functools import partial

import jax
from flax.linen import initializers
from flax.linen.initializers import Initializer

from bnjax.names import choose

torch_default: Initializer = initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(-b, b) with b = 1 / sqrt(fan_in): the kernel of PyTorch's `nn.Linear`."""

xavier_uniform: Initializer = initializers.xavier_uniform()
"""U(-b, b) with b = sqrt(6 / (fan_in + fan_out)): Glorot & Bengio (2010), equation 16."""

xavier_normal: Initializer = initializers.variance_scaling(1.0, "fan_avg", "normal")
"""N(0, 2 / (fan_in + fan_out)): Glorot & Bengio (2010), equation 12."""

he_uniform: Initializer = initializers.he_uniform()
"""U(-b, b) with b = sqrt(6 / fan_in): He et al. (2015), section 2.2."""

he_normal: Initializer = initializers.variance_scaling(2.0, "fan_in", "normal")
"""N(0, 2 / fan_in): He et al. (2015), equation 10."""

KERNELS: dict[str, Initializer] = {
    "torch_default": torch_default,
    "xavier_uniform": xavier_uniform,
    "xavier_normal": xavier_normal,
    "he_uniform": he_uniform,
    "he_normal": he_normal,
}


def normal(std: float) -> Initializer:
    """N(0, std^2), whatever the shape; a `ValueError` unless `std` is positive and finite."""
    if not (math.isfinite(std) and std > 0):
        raise ValueError(f"normal({std}): the standard deviation must be positive and finite")
    return initializers.normal(std)


def torch_default_bias(fan_in: int) -> Initializer:
    """U(-b, b) with b = 1 / sqrt(fan_in): the bias of PyTorch's `nn.Linear`.

    The shape of a bias does not tell `fan_in`, so it is given.

    Example:
        >>> bias = torch_default_bias(fan_in=4)(jax.random.key(0), (1000,))
        >>> bool(abs(bias).max() <= 0.5)
        True
    """
    bound = 1 / math.sqrt(fan_in)
    return partial(jax.random.uniform, minval=-bound, maxval=bound)


def kernel(name: str) -> Initializer:
    """The kernel initializer of that name: a key of `KERNELS`, or `normal(0.05)` or the like.

    Raises:
        ValueError: if there is none, with the nearest name.

    Example:
        >>> kernel("he_normal") is he_normal
        True
    """
    if match := re.fullmatch(r"normal\(([^()]*)\)", name):
        try:
            std = float(match[1])
        except ValueError:
            raise ValueError(f"{name}: expected a number, as in normal(0.05)") from None
        return normal(std)
    return KERNELS[choose("initializer", name, [*KERNELS, "normal(STD)"])]

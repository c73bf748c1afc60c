"""Normalizations by name, as `bnjax.models` takes them: each makes a module for training or not."""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from bnjax.layers import BatchNorm
from bnjax.moments import as_samples, centre, check_sample_count, statistics_dtype
from bnjax.names import choose, split_number

EPSILON = 1e-5

Norm = Callable[[bool], nn.Module]
"""Makes the normalization of a layer, in training mode or not."""


class GroupNorm(nn.Module):
    """Group normalization: each example by its own groups of features, over all their positions.

        y = scale * (x - mean) / sqrt(var + epsilon) + bias

    One group is layer normalization. Flax's layers have the same outputs, but lose three digits
    for every factor of a thousand by which data are away from zero.

    Attributes:
        num_groups: into so many parts the features are cut; must divide them, or `ValueError`.
        centred: subtract the mean and add a bias; without it this is root mean square
            normalization, `y = scale * x / sqrt(mean(x^2) + epsilon)`.

    Source: Wu & He, "Group normalization" (2018); Ba, Kiros & Hinton, "Layer normalization"
    (2016); Zhang & Sennrich, "Root mean square layer normalization" (2019).

    Example:
        >>> import jax
        >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
        >>> y, _ = GroupNorm(num_groups=2).init_with_output(jax.random.key(0), x)
        >>> print(y.round(3))
        [[-1.  1. -1.  1.]]
    """

    num_groups: int = 1
    centred: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalizes `x`, `[N, ..., C]` floating point; a `ValueError` says if it is not."""
        x = as_samples(x)
        dtype, features = statistics_dtype(x), x.shape[-1:]
        if self.num_groups < 1 or features[0] % self.num_groups:
            raise ValueError(
                f"num_groups is {self.num_groups}: expected a divisor of the {features[0]} features"
            )
        cut = (self.num_groups, features[0] // self.num_groups)
        groups = x.astype(dtype).reshape(x.shape[0], math.prod(x.shape[1:-1]), *cut)
        mean = partial(jnp.mean, axis=(1, 3), keepdims=True)
        if self.centred:  # once by a rounded mean, which is not to be differentiated, and once more
            groups = groups - lax.stop_gradient(mean(groups))
            groups = groups - mean(groups)
        groups = groups / jnp.sqrt(mean(jnp.square(groups)) + EPSILON)
        y = groups.reshape(-1, *features)
        y = y * self.param("scale", nn.initializers.ones, features).astype(dtype)[None]
        if self.centred:
            y = y + self.param("bias", nn.initializers.zeros, features).astype(dtype)[None]
        return y.reshape(x.shape).astype(x.dtype)


class MeanOnlyBatchNorm(nn.Module):
    """Mean-only batch normalization: subtracts the mean, adds a bias, does not divide.

        y = x - mean + bias,   running mean' = momentum * running mean + (1 - momentum) * mean

    Attributes:
        use_running_average: subtract the running mean (evaluation), not that of the batch.
        momentum: what the running mean keeps of itself at each batch.

    Source: Salimans & Kingma, "Weight normalization" (2016), section 4.

    Example:
        >>> import jax
        >>> layer = MeanOnlyBatchNorm(use_running_average=False)
        >>> y, _ = layer.init_with_output(jax.random.key(0), jnp.array([[1.0], [3.0]]))
        >>> print(y.ravel())
        [-1.  1.]
    """

    use_running_average: bool
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalizes `x`, `[N, ..., C]` floating point.

        Raises:
            ValueError: if it is not, or, but for `init`, there are too few samples to train with.
        """
        x = as_samples(x)
        dtype, features = statistics_dtype(x), x.shape[-1:]
        bias = self.param("bias", nn.initializers.zeros, features)
        running = self.variable("batch_stats", "mean", jnp.zeros, features, dtype)
        rows = x.astype(dtype).reshape(-1, *features)
        if self.use_running_average:
            rows = rows - running.value.astype(dtype)[None]
        else:
            rows, (mean, _, count) = centre(rows, None, None)
            if not self.is_initializing():
                check_sample_count(x)
                old = running.value.astype(dtype)
                new = self.momentum * old + (1 - self.momentum) * mean
                running.value = jnp.where(count >= 2, new, old)
        return (rows + bias.astype(dtype)[None]).reshape(x.shape).astype(x.dtype)


def _batch(train: bool, **fields: object) -> nn.Module:
    """Batch normalization with the conventions of PyTorch's `nn.BatchNorm1d`."""
    settings = {"momentum": 0.9, "epsilon": EPSILON, "ddof": 1, **fields}
    return BatchNorm(use_running_average=not train, **settings)  # type: ignore[arg-type]


NORMS: dict[str, Callable] = {
    "batch": _batch,
    "ghost(SIZE)": lambda size: partial(_batch, virtual_batch_size=size),
    "renorm": partial(_batch, renorm=(3.0, 5.0)),
    "layer": lambda train: GroupNorm(),
    "rms": lambda train: GroupNorm(centred=False),
    "group(GROUPS)": lambda groups: lambda train: GroupNorm(groups),
    "mean_only": lambda train: MeanOnlyBatchNorm(use_running_average=not train),
    "batch_no_affine": partial(_batch, use_scale=False, use_bias=False),
}
"""By name what makes a module of `train`; those with a parameter make that of a number first."""

# The names with a number, and the least that it may be.
_FAMILIES = {"ghost": ("ghost(SIZE)", 2), "group": ("group(GROUPS)", 1)}


def norm(name: str | Norm) -> Norm:
    """The normalization of that name, as `"batch"` or `"group(8)"`; what is no name is given back.

    Raises:
        ValueError: if there is none, with the nearest name, or its number is none or too small.

    Example:
        >>> norm("ghost(25)")(True).virtual_batch_size
        25
    """
    if not isinstance(name, str):
        return name
    family, number = split_number(name)
    if family not in _FAMILIES:
        return NORMS[choose("norm", name, NORMS)]
    key, least = _FAMILIES[family]
    if number < least:
        raise ValueError(
            f"norm {name}: expected a whole number of at least {least}, as in {family}(8)"
        )
    return NORMS[key](number)

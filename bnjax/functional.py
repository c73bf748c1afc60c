"""Batch normalization on arrays: pure functions, statistics in and statistics out.

Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
Covariate Shift" (2015), algorithm 1, for input `[N, ..., C]`: features last, statistics over all
other axes. How the moments stay accurate stands in `bnjax.moments`.

Arguments are the same everywhere: `x` is `[N, ..., C]` floating point, and bfloat16 and float16 are
computed in float32; `scale` and `bias` are `[C]`, or None for 1 and 0; `stats` are the running
statistics, each `[C]`; `epsilon` is added to the variance, inside the root. What does not fit `x`
is a `ValueError`. Results have the shape and dtype of `x`.
"""

from numbers import Real
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bnjax.moments import as_samples, centre, check_sample_count, statistics_dtype


class BatchStats(NamedTuple):
    """Running statistics of one batch normalization layer.

    Attributes:
        mean, var: `[C]`, float32 (float64 for float64 input); they start at 0 and 1.
        count: `[]` int32, the number of batches seen, kept up where it is not None.
    """

    mean: Array
    var: Array
    count: Array | None = None  # type: ignore[assignment]


def batch_norm_train(
    x: Array,
    scale: Array | None,
    bias: Array | None,
    stats: BatchStats,
    *,
    momentum: float | None = 0.9,
    epsilon: float = 1e-5,
    ddof: int = 0,
    mask: Array | None = None,
    axis_name: str | None = None,
) -> tuple[Array, BatchStats]:
    """Normalizes with the statistics of the batch and updates the running ones.

        y = scale * (x - mean) / sqrt(var + epsilon) + bias,   var the biased batch variance
        stats' = momentum * stats + (1 - momentum) * batch statistic

    This is Flax's momentum: PyTorch's is one minus this one.

    Args:
        x, scale, bias, stats, epsilon: as the module says.
        momentum: what the running statistics keep of themselves, or None for the average over
            all batches seen (PyTorch's `momentum=None`); a missing `stats.count` then means 0,
            but `lax.scan` needs it to be there from the start.
        ddof: which variance the running one tracks: 0 biased (Flax, Keras, Haiku, CS231n),
            1 unbiased, times n / (n - 1) (PyTorch). `y` always uses the biased one.
        mask: boolean of shape `x.shape[:-1]`. Rows where it is False come out as 0 and have no
            influence on anything, even when they hold NaN.
        axis_name: a mapped axis over which to share statistics. Counts and sums are added before
            they are divided, so that devices with unequal counts are exact.

    Returns:
        `y` and the updated statistics. Where there are fewer than two valid rows and only run time
        can know (a mask, a symbolic size of `jax.export`), the statistics are returned as they
        came.

    Raises:
        ValueError: also if the shapes leave fewer than two samples per feature.

    Source: Ioffe & Szegedy (2015), algorithm 1 and section 3.1.

    Example:
        >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
        >>> y, stats = batch_norm_train(x, None, None, BatchStats(jnp.zeros(2), jnp.ones(2)))
        >>> print(y.round(3))
        [[-1. -1.]
         [ 1.  1.]]
        >>> print(stats.mean)
        [0.2 2. ]
    """
    x = _fitting("x", x, stats, scale=scale, bias=bias)
    if mask is not None:
        mask = jnp.asarray(mask)
        if mask.shape != x.shape[:-1] or mask.dtype != bool:
            raise ValueError(
                f"mask has shape {mask.shape} and dtype {mask.dtype}: x of shape {x.shape} needs "
                f"{x.shape[:-1]} and bool, one value for every sample, True where x counts"
            )
    if ddof not in (0, 1):
        raise ValueError(f"ddof is {ddof}: expected 0 (biased) or 1 (unbiased running variance)")
    if isinstance(momentum, Real) and not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum}: expected 0 to 1, or None for the average")
    check_sample_count(x, axis_name)

    dtype = statistics_dtype(x)
    valid = None if mask is None else mask.reshape(-1, 1)
    centred, (mean, var, count) = centre(_rows(x, dtype), valid, axis_name)
    y = _scale_and_shift(centred, var, scale, bias, epsilon)
    if valid is not None:
        y = jnp.where(valid, y, 0)

    batch = BatchStats(mean, var * (count / jnp.maximum(count - 1, 1)) if ddof else var)
    before, updated = _update(stats, batch, momentum)
    if valid is not None or not isinstance(x.size, int):
        updated = jax.tree.map(lambda new, old: jnp.where(count >= 2, new, old), updated, before)
    return y.reshape(x.shape).astype(x.dtype), updated


def batch_norm_eval(
    x: Array,
    scale: Array | None,
    bias: Array | None,
    stats: BatchStats,
    *,
    epsilon: float = 1e-5,
) -> Array:
    """Normalizes with the running statistics; every example is treated on its own, for any N.

        y = scale * (x - stats.mean) / sqrt(stats.var + epsilon) + bias

    Source: Ioffe & Szegedy (2015), algorithm 2, steps 10 to 12.

    Example:
        >>> stats = BatchStats(mean=jnp.array([2.0]), var=jnp.array([4.0]))
        >>> print(batch_norm_eval(jnp.array([[6.0]]), None, None, stats, epsilon=0.0))
        [[2.]]
    """
    x = _fitting("x", x, stats, scale=scale, bias=bias)
    dtype = statistics_dtype(x)
    centred = _rows(x, dtype) - stats.mean.astype(dtype)[None]
    y = _scale_and_shift(centred, stats.var.astype(dtype), scale, bias, epsilon)
    return y.reshape(x.shape).astype(x.dtype)


def fold(
    kernel: Array,
    bias: Array | None,
    scale: Array | None,
    offset: Array | None,
    stats: BatchStats,
    epsilon: float = 1e-5,
) -> tuple[Array, Array]:
    """Merges evaluation-mode batch normalization into the linear layer before it.

        kernel' = kernel * factor,   factor = scale / sqrt(stats.var + epsilon)
        bias' = (bias - stats.mean) * factor + offset

    so that `x @ kernel' + bias'` is what normalization makes of `x @ kernel + bias`.

    Args:
        kernel: `[..., C]`, output features last, as Flax's Dense and Conv have it.
        bias: `[C]` bias of the linear layer, or None for 0.
        scale, offset: of the normalization, where `offset` is its bias.

    Returns:
        The kernel and bias of the one linear layer, of the dtype of `kernel`.

    Source: Ioffe & Szegedy (2015), algorithm 2, step 11; Jacob et al., "Quantization and Training
    of Neural Networks for Efficient Integer-Arithmetic-Only Inference" (2018), section 3.2.

    Example:
        >>> stats = BatchStats(mean=jnp.array([3.0]), var=jnp.array([4.0]))
        >>> kernel, bias = fold(jnp.array([[2.0]]), None, None, None, stats, epsilon=0.0)
        >>> print(kernel, bias)
        [[1.]] [-1.5]
    """
    kernel = _fitting("kernel", kernel, stats, bias=bias, scale=scale, offset=offset)
    zeros = jnp.zeros(kernel.shape[-1], statistics_dtype(kernel))
    row = (zeros if bias is None else bias.astype(zeros.dtype))[None]
    shifted = batch_norm_eval(row, scale, offset, stats, epsilon=epsilon)[0]
    stats = stats._replace(mean=zeros)
    kernel = batch_norm_eval(kernel, scale, None, stats, epsilon=epsilon)
    return kernel, shifted.astype(kernel.dtype)


def as_scalar(value: float | Array, dtype: jnp.dtype) -> float | Array:
    """A setting that does not widen what it meets, as NumPy's float64 would under x64."""
    return float(value) if isinstance(value, Real) else jnp.asarray(value, dtype)


def _rows(x: Array, dtype: jnp.dtype) -> Array:
    return x.astype(dtype).reshape(-1, x.shape[-1])


def _scale_and_shift(
    centred: Array, var: Array, scale: Array | None, bias: Array | None, epsilon: float
) -> Array:
    factor = 1 / jnp.sqrt(var + as_scalar(epsilon, var.dtype))
    if scale is not None:
        factor = scale.astype(centred.dtype) * factor
    y = centred * factor[None]
    return y if bias is None else y + bias.astype(centred.dtype)[None]


def _update(
    stats: BatchStats, batch: BatchStats, momentum: float | None
) -> tuple[BatchStats, BatchStats]:
    """The running statistics before a batch, of the dtype of its own, and after it."""
    dtype = batch.mean.dtype
    seen = jnp.zeros((), jnp.int32) if stats.count is None else jnp.asarray(stats.count)
    keep = 1 - 1 / (seen + 1).astype(dtype) if momentum is None else as_scalar(momentum, dtype)
    before = BatchStats(stats.mean.astype(dtype), stats.var.astype(dtype))
    after = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, before, batch)
    if momentum is not None and stats.count is None:
        return before, after
    return before._replace(count=seen), after._replace(count=seen + 1)


def _fitting(name: str, x: Array, stats: BatchStats, **vectors: Array | None) -> Array:
    """`x` as a JAX array, of which all else has the number of features."""
    x = as_samples(x, name)
    features = (x.shape[-1],)
    for key, value in {**vectors, "stats.mean": stats.mean, "stats.var": stats.var}.items():
        if value is not None and value.shape != features:
            raise ValueError(
                f"{key} has shape {value.shape}: {name} of shape {x.shape} needs {features}"
            )
    return x

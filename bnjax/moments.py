"""Means and variances that stay accurate at any offset, on rows `[N, C]`.

A float32 mean of data near 1e5 is off by up to 4e-3, and the textbook E[x^2] - E[x]^2 loses every
digit there. So everything is measured from a provisional mean: `x - provisional` is exact for
values near it (Sterbenz), and only the small mean that remains has to be rounded.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

# Rows that are summed one after the other. Rounding errors grow with the square root of the run,
# so longer sums are split into blocks of at most this many rows, whose sums are summed again.
SUM_BLOCK = 64


class Moments(NamedTuple):
    """Mean `[C]`, biased variance `[C]` and floating point number `[]` or `[C]` of samples."""

    mean: Array
    var: Array
    count: Array  # type: ignore[assignment]


def statistics_dtype(x: Array) -> jnp.dtype:
    """The dtype of the statistics of `x`: float64 for float64 input, else float32.

    Example:
        >>> print(statistics_dtype(jnp.zeros(3, jnp.bfloat16)))
        float32
    """
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def as_samples(x: ArrayLike, name: str = "x") -> Array:
    """`x` as a JAX array; a `ValueError` if it is no floating point `[N, ..., C]`."""
    x = jnp.asarray(x)
    if x.ndim < 2 or not x.shape[-1] or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} is {x.dtype}{list(x.shape)}: expected floating point [N, ..., C]")
    return x


def check_sample_count(x: Array, axis_name: str | None = None) -> None:
    """Refuses `x` `[N, ..., C]` whose shape leaves fewer than two samples per feature.

    Sizes that are symbols, as `jax.export` knows them, are left to run time.

    Raises:
        ValueError: naming their number, the shape and the remedies.
    """
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    samples = devices * math.prod(x.shape[:-1])
    if isinstance(samples, int) and samples < 2:
        raise ValueError(
            f"batch normalization in training needs at least 2 samples per feature, found "
            f"N = {samples} in x of shape {x.shape}: use a larger batch, drop the last short "
            "batch, or normalize with running statistics (evaluation mode)"
        )


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def centre(x: Array, valid: Array | None, axis_name: str | None) -> tuple[Array, Moments]:
    """Centres `x` over its valid rows, on all devices of `axis_name` together.

    The derivative is written out. What autodiff makes of the way around the provisional mean took
    2 to 32 % more time, forward and backward, on two cores at 65536 x 256 and 100 x 32:

        d(x - mean) = dx - d mean,   d mean = E[dx],   d var = 2 E[(x - mean) dx]

    Args:
        x: `[N, C]` float32 or float64.
        valid: `[N, 1]` boolean, the rows that count, or None for all.
        axis_name: a mapped axis whose devices share the statistics, or None.

    Returns:
        `x - mean`, of which rows that are not valid mean nothing, and the moments.

    Source: Chan, Golub & LeVeque, "Algorithms for Computing the Sample Variance: Analysis and
    Recommendations" (1983), on shifted data and pairwise sums.

    Example:
        >>> centred, moments = centre(jnp.array([[100001.0], [100003.0]]), None, None)
        >>> print(centred.ravel(), *moments)
        [-1.  1.] [100002.] [1.] 2.0
    """
    if valid is None:
        count = jnp.asarray(x.shape[0], x.dtype)
    else:
        x = jnp.where(valid, x, 0)
        count = jnp.sum(valid, dtype=x.dtype)

    total, count = _psum((_sum_rows(x), count), axis_name)
    divisor = jnp.maximum(count, 1)
    estimate = total / divisor
    provisional = _drop_low_bits(estimate)
    deviation = x - provisional[None]
    if valid is not None:
        deviation = jnp.where(valid, deviation, 0)
    first, second = _psum((_sum_rows(deviation), _sum_rows(jnp.square(deviation))), axis_name)
    remainder = first / divisor
    var = second / divisor - jnp.square(remainder)
    var = jnp.where(var < 0, 0, var)

    # The deviations of data around zero are rounded, their plain sum is the better one.
    mean = jnp.where(jnp.square(estimate) < var, estimate, provisional + remainder)
    return deviation - remainder[None], Moments(mean, var, count)


@centre.defjvp
def _centre_jvp(
    axis_name: str | None, primals: tuple[Array, Array | None], tangents: tuple[Array, Any]
) -> tuple[tuple[Array, Moments], tuple[Array, Moments]]:
    (x, valid), (dx, _) = primals, tangents
    centred, moments = centre(x, valid, axis_name)
    if valid is not None:
        dx = jnp.where(valid, dx, 0)
    divisor = jnp.maximum(moments.count, 1)
    first, second = _psum((dx.sum(axis=0), (centred * dx).sum(axis=0)), axis_name)
    d_mean = first / divisor
    d_moments = Moments(d_mean, 2 * second / divisor, jnp.zeros_like(moments.count))
    return (centred, moments), (dx - d_mean[None], d_moments)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of two sets of samples together.

        mean = mean_a + (mean_b - mean_a) n_b / n
        n var = n_a var_a + n_b var_b + (mean_b - mean_a)^2 n_a n_b / n

    Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances" (1979).

    Example:
        >>> one, three = (Moments(jnp.array([v]), jnp.array([0.0]), jnp.array(1.0)) for v in (1, 3))
        >>> both = merge(one, three)
        >>> print(both.mean, both.var, both.count)
        [2.] [1.] 2.0
    """
    count = a.count + b.count
    weight = b.count / (count + (count == 0))
    difference = b.mean - a.mean
    mean = a.mean + difference * weight
    var = (1 - weight) * a.var + weight * b.var + difference**2 * (weight * (1 - weight))
    return Moments(mean, var, count)


def _drop_low_bits(x: Array) -> Array:
    """`x` to all but its last six bits.

    A compiler may fuse the division behind a mean into the subtraction that uses it, and then
    different uses see differently rounded means. A shorter number is the same number everywhere.
    """
    info = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant - 6)


def _sum_rows(x: Array) -> Array:
    """Sums `[N, C]` to `[C]`, block by block."""
    if not isinstance(x.shape[0], int):
        for _ in range(3):  # of a symbolic number: 64**4 rows in runs of 128 at most
            x = _sum_blocks(x, SUM_BLOCK)
        return x.sum(axis=0)
    while len(x) > SUM_BLOCK and (size := _block_size(len(x))) > 1:
        x = _sum_blocks(x, size)
    return x.sum(axis=0)


def _sum_blocks(x: Array, size: int) -> Array:
    blocks, rest = divmod(x.shape[0], size)
    sums = x[: blocks * size].reshape(blocks, size, x.shape[1]).sum(axis=1)
    if isinstance(rest, int) and not rest:
        return sums
    return jnp.concatenate([sums, x[blocks * size :]])


def _block_size(rows: int) -> int:
    """Rows per block, such that devices that share the rows evenly share the blocks evenly.

    Otherwise they would have to send each other rows, not only sums. Few rows that cannot be cut so
    are summed at once (1), many have blocks of any size.
    """
    devices = math.gcd(rows, SUM_BLOCK)
    size = max(s for s in range(1, SUM_BLOCK + 1) if rows % (s * devices) == 0)
    if size >= SUM_BLOCK // 8:
        return size
    return 1 if rows <= 8 * SUM_BLOCK else SUM_BLOCK


def _psum(tree: tuple[Array, Array], axis_name: str | None) -> tuple[Array, Array]:
    return tree if axis_name is None else lax.psum(tree, axis_name)

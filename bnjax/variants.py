"""Relatives of batch normalization, made of `batch_norm_train`: ghost batches and renorm."""

from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from bnjax.functional import BatchStats, as_scalar, batch_norm_train

Train = Callable[..., tuple[Array, BatchStats]]


def virtual_batches(train: Train, size: int) -> Train:
    """Ghost batch normalization: `train` on every `size` consecutive examples in turn.

    The running statistics pass from one virtual batch to the next, as if each had been a batch of
    its own. Hoffer, Hubara & Soudry, "Train longer, generalize better" (2017), algorithm 1.

    Args:
        train: `(x, scale, bias, stats, *, mask) -> (y, stats)`, such as `batch_norm_train`.
        size: examples in a virtual batch.

    Returns:
        A function of the same form, which also raises `ValueError` if `size` does not divide the
        batch.

    Example:
        >>> train = virtual_batches(batch_norm_train, 2)
        >>> x = jnp.array([[1.0], [3.0], [10.0], [30.0]])
        >>> y, _ = train(x, None, None, BatchStats(jnp.zeros(1), jnp.ones(1)))
        >>> print(y.ravel().round(3))
        [-1.  1. -1.  1.]
    """

    def train_each(
        x: Array,
        scale: Array | None,
        bias: Array | None,
        stats: BatchStats,
        *,
        mask: Array | None = None,
    ) -> tuple[Array, BatchStats]:
        _, after = train(x, scale, bias, stats, mask=mask)
        count = x.shape[0]
        if size < 1 or count % size != 0:
            hint = "" if isinstance(count, int) else f", as an export knows of {size}*n"
            raise ValueError(
                f"virtual_batch_size is {size}: expected a positive number that divides "
                f"the batch of {count} examples{hint}"
            )

        def step(stats: BatchStats, group: tuple[Array, Array | None]) -> tuple[BatchStats, Array]:
            y, stats = train(group[0], scale, bias, stats, mask=group[1])
            return stats, y

        groups = jax.tree.map(lambda a: a.reshape(count // size, size, *a.shape[1:]), (x, mask))
        stats, y = lax.scan(step, _alike(stats, after), groups)
        return y.reshape(x.shape), stats

    return train_each


def _alike(stats: BatchStats, after: BatchStats) -> BatchStats:
    """`stats` as a scan needs them: of the types of `after`, varying over the same devices.

    The compiler sees that the values of `after` are not used, and leaves them out.
    """
    if stats.count is None and after.count is not None:
        stats = stats._replace(count=jnp.zeros_like(after.count))
    after = lax.stop_gradient(after)
    return jax.tree.map(lambda a, b: jnp.where(False, b, a.astype(b.dtype)), stats, after)


def batch_renorm_train(
    x: Array,
    scale: Array | None,
    bias: Array | None,
    stats: BatchStats,
    *,
    limits: tuple[float, float],
    epsilon: float = 1e-5,
    mask: Array | None = None,
    axis_name: str | None = None,
    **settings: Any,
) -> tuple[Array, BatchStats]:
    """Batch renormalization: what evaluation will see, within limits, with the batch's gradients.

        y = scale * ((x - mean) / s * r + d) + bias,   s = sqrt(var + epsilon)
        r = clip(s / s', 1 / r_max, r_max)             s' = sqrt(stats.var + epsilon)
        d = clip((mean - stats.mean) / s', -d_max, d_max)

    with the batch's mean and biased variance; r and d are constants to differentiation. Ioffe,
    "Batch Renormalization" (2017), algorithm 1, except that the running statistic is the variance,
    as everywhere here, not its root. The paper starts at (1, 0), plain batch normalization, and
    relaxes to (3, 5) during the first part of the training.

    Args:
        limits: r_max, at least 1, and d_max, at least 0, or `ValueError`. They may be traced, to be
            scheduled without compiling again. All else, and what comes back, is as for
            `batch_norm_train`.

    Example:
        >>> stats = BatchStats(mean=jnp.array([0.0]), var=jnp.array([4.0]))
        >>> x = jnp.array([[0.0], [4.0]])
        >>> for limits in ((1.0, 0.0), (3.0, 5.0)):
        ...     y, _ = batch_renorm_train(x, None, None, stats, limits=limits)
        ...     print(y.ravel().round(3))  # as the batch alone, then as x / 2 in evaluation
        [-1.  1.]
        [0. 2.]
    """
    if len(limits) != 2:
        raise ValueError(f"the limits are {limits}: expected two, r_max and d_max")
    for name, limit, least in zip(("r_max", "d_max"), limits, (1, 0), strict=True):
        if isinstance(limit, Real) and not limit >= least:
            raise ValueError(f"{name} is {limit}: expected at least {least}")
    train = partial(batch_norm_train, epsilon=epsilon, mask=mask, axis_name=axis_name)
    running = BatchStats(stats.mean, stats.var)
    _, batch = train(x, scale, bias, running, momentum=0.0)
    mean, var = (a.astype(batch.mean.dtype) for a in running[:2])
    r_max, d_max, added = (as_scalar(value, var.dtype) for value in (*limits, epsilon))
    std = jnp.sqrt(var + added)
    r = jnp.clip(jnp.sqrt(batch.var + added) / std, 1 / r_max, r_max)
    d = jnp.clip((batch.mean - mean) / std, -d_max, d_max)
    r, d = lax.stop_gradient((r, d))
    if scale is not None:
        r, d = scale.astype(r.dtype) * r, scale.astype(d.dtype) * d
    if bias is not None:
        d = d + bias.astype(d.dtype)
    return train(x, r, d, stats, **settings)

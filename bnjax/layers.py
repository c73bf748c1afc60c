"""Batch normalization as a Flax Linen layer, over the functions of `bnjax.functional`."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.module import merge_param
from jax import Array
from jax.typing import DTypeLike
from numpy.lib.array_utils import normalize_axis_tuple

from bnjax.functional import BatchStats, batch_norm_eval, batch_norm_train
from bnjax.moments import statistics_dtype
from bnjax.variants import Train, batch_renorm_train, virtual_batches


class BatchNorm(nn.Module):
    """Batch normalization with the fields and the variables of `flax.linen.BatchNorm`.

    Variables: `params` `scale` and `bias`, `batch_stats` `mean` and `var`, each `[C]`. A Flax user
    changes the import and keeps the checkpoints. What differs: a batch's statistics are accurate at
    any offset (Flax's default loses all digits near 1e4); a training batch with fewer than two
    samples per feature is a `ValueError` instead of an output equal to the bias; the result has the
    input's dtype, where Flax promotes it with that of the parameters; float64 input has float64
    statistics, only floating point is taken; a mask says which samples count, never which features.

    Attributes:
        use_running_average: True normalizes with the running statistics (evaluation), False with
            those of the batch (training). Given here or in the call.
        axis: the feature axis, or several; the variables have the shape of `x` there.
        momentum: what the running statistics keep of themselves at each batch (PyTorch's momentum
            is one minus this one), or None for the average over all batches; their number is then
            the variable `count` in `batch_stats`, which is kept up wherever it is found.
        epsilon: added to the variance, inside the root.
        dtype, param_dtype: of the result (None: that of the input); of scale and bias.
        bias_init, scale_init: initializers of bias and scale.
        use_bias, use_scale: whether to add a learned bias, to multiply by a learned scale.
        axis_name: mapped axis over which to share the batch statistics.
        axis_index_groups: must be None; sharing within groups of devices is not supported.
        use_fast_variance, force_float32_reductions: accepted for Flax's sake, change nothing.
        ddof: 0 tracks the biased variance (Flax), 1 the unbiased one (PyTorch).
        virtual_batch_size: normalize every so many consecutive examples on their own (ghost batch
            normalization, `bnjax.variants.virtual_batches`); must divide the batch.
        renorm: `(r_max, d_max)` of batch renormalization (`bnjax.variants.batch_renorm_train`).

    Source: Ioffe & Szegedy (2015), algorithms 1 and 2.

    Example:
        >>> import jax
        >>> layer = BatchNorm(use_running_average=False)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> variables = layer.init(jax.random.key(0), x)
        >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
        >>> print(y.ravel().round(3), updates["batch_stats"]["mean"].round(3))
        [-1.  1.] [0.02]
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float | None = 0.99
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    ddof: int = 0
    virtual_batch_size: int | None = None
    renorm: tuple[float, float] | None = None

    @nn.compact
    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """Normalizes `x`, whose shape the result has, over all axes but the feature axis.

        Args:
            x: `[N, ..., C]` floating point, with the features where `axis` says.
            use_running_average: instead of the field.
            mask: boolean of the shape of `x` without the feature axes, or of as many axes as `x`
                with length 1 there, which is broadcast over the others, as `[N, 1, 1, 1]` over
                images; samples where it is False count for nothing and come out as 0. Ignored with
                running statistics, as in Flax.

        Raises:
            ValueError: if training finds fewer than two samples per feature, a batch that
                `virtual_batch_size` does not divide, or anything that does not fit `x`. `init`
                accepts any number of samples.
        """
        use_running_average = merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        x = jnp.asarray(x)
        dtype = self.dtype or x.dtype
        if self.dtype is not None:  # a wider result is not to be rounded to the input's dtype first
            x = x.astype(jnp.float64 if dtype == jnp.float64 else statistics_dtype(x))
        x, mask, shape = features_last(x, self.axis, mask)
        single = x.ndim == 1  # one sample of many that `vmap` maps over
        if single:
            x, mask = x[None], None if mask is None else mask[None]

        scale = self._param("scale", self.scale_init, shape) if self.use_scale else None
        bias = self._param("bias", self.bias_init, shape) if self.use_bias else None
        stats_dtype = statistics_dtype(x)
        mean: Any = self.variable("batch_stats", "mean", jnp.zeros, shape, stats_dtype)
        var: Any = self.variable("batch_stats", "var", jnp.ones, shape, stats_dtype)
        stats = BatchStats(mean.value.ravel(), var.value.ravel())
        counted = self.has_variable("batch_stats", "count") or (
            self.momentum is None and self.is_mutable_collection("batch_stats")
        )
        if counted:
            count: Any = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
            stats = stats._replace(count=count.value)

        untrainable = self.is_initializing() and (
            math.prod(x.shape[:-1]) in (0, 1) or x.shape[0] % (self.virtual_batch_size or 1) != 0
        )
        if use_running_average or untrainable:
            y = batch_norm_eval(x, scale, bias, stats, epsilon=self.epsilon)
        else:
            y, updated = self._train()(x, scale, bias, stats, mask=mask)
            if not self.is_initializing():
                mean.value, var.value = updated.mean.reshape(shape), updated.var.reshape(shape)
                if counted:
                    count.value = updated.count
        y = y[0] if single else y
        y = y.reshape(*y.shape[:-1], *shape)
        axes = sorted(normalize_axis_tuple(self.axis, y.ndim))
        return jnp.moveaxis(y, range(-len(shape), 0), axes).astype(dtype)

    def _param(self, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]) -> Array:
        return self.param(name, init, shape, self.param_dtype).ravel()

    def _train(self) -> Train:
        if self.axis_index_groups is not None:
            raise ValueError("axis_index_groups is set: expected None, share over all of axis_name")
        train: Train = batch_norm_train
        if self.renorm is not None:
            train = partial(batch_renorm_train, limits=self.renorm)
        train = partial(
            train,
            momentum=self.momentum,
            epsilon=self.epsilon,
            ddof=self.ddof,
            axis_name=None if self.is_initializing() else self.axis_name,
        )
        size = self.virtual_batch_size
        return train if size is None else virtual_batches(train, size)


def features_last(
    x: Array, axis: int | Sequence[int], mask: Array | None = None
) -> tuple[Array, Array | None, tuple[int, ...]]:
    """Brings features to the end, as one axis, of `x` and a mask as `BatchNorm` takes them.

    Returns:
        `x` as `[N, ..., C]`, the mask as `[N, ...]`, and the shape of the features, of product C.
    """
    axes = sorted(normalize_axis_tuple(axis, x.ndim))
    shape = tuple(x.shape[a] for a in axes)
    if mask is not None and mask.ndim == x.ndim and all(mask.shape[a] == 1 for a in axes):
        samples = [1 if a in axes else size for a, size in enumerate(x.shape)]
        mask = jnp.broadcast_to(mask, samples).squeeze(tuple(axes))
    x = jnp.moveaxis(x, axes, range(-len(axes), 0))
    return x.reshape(*x.shape[: -len(axes)], math.prod(shape)), mask, shape

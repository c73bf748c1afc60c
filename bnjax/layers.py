"""Batch normalization as a Flax Linen layer, over the functions of `bnjax.functional`."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.module import merge_param
from jax import Array
from jax.typing import DTypeLike

from bnjax.functional import BatchStats, batch_norm_eval, batch_norm_train
from bnjax.moments import statistics_dtype


class BatchNorm(nn.Module):
    """Batch normalization with the fields and the variables of `flax.linen.BatchNorm`.

    Variables: `params` `scale` and `bias`, `batch_stats` `mean` and `var`, each `[C]`. A Flax user
    changes the import and keeps the checkpoints. What differs: the statistics are accurate at any
    offset (Flax's default loses all digits near 1e4), a training batch with fewer than two samples
    per feature is a `ValueError` instead of an output equal to the bias, and `ddof` chooses the
    variance that is tracked. Without `dtype` the result has the dtype of the input, where Flax
    promotes it with that of the parameters; float64 input has float64 statistics; `axis` is one
    axis.

    Attributes:
        use_running_average: True normalizes with the running statistics (evaluation), False with
            those of the batch (training). Given here or in the call.
        axis: the feature axis.
        momentum: what the running statistics keep of themselves at each batch (PyTorch's momentum
            is one minus this one).
        epsilon: added to the variance, inside the root.
        dtype: dtype of the result; that of the input by default.
        param_dtype: dtype of scale and bias.
        use_bias: add a learned bias.
        use_scale: multiply by a learned scale.
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        axis_name: mapped axis over which to share the batch statistics.
        axis_index_groups: must be None; sharing within groups of devices is not supported.
        use_fast_variance: accepted for Flax's sake, changes nothing.
        force_float32_reductions: accepted for Flax's sake, changes nothing.
        ddof: 0 tracks the biased variance (Flax), 1 the unbiased one (PyTorch).

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
    axis: int = -1
    momentum: float = 0.99
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

    @nn.compact
    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """Normalizes `x` over all axes but the feature axis.

        Args:
            x: `[N, ..., C]` floating point, with the features where `axis` says.
            use_running_average: as the field, which may not be given as well.
            mask: boolean of the shape of `x` without the feature axis, or with length 1 there;
                rows where it is False count for nothing and come out as 0. Ignored with running
                statistics, as in Flax.

        Returns:
            The normalized array, of the shape of `x`.

        Raises:
            ValueError: if training finds fewer than two samples per feature, or `mask` or the
                variables do not fit `x`. `init` accepts any number of samples.
        """
        use_running_average = merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        if self.axis_index_groups is not None:
            raise ValueError("axis_index_groups is set: expected None, share over all of axis_name")
        dtype = self.dtype or x.dtype
        x = jnp.moveaxis(x, self.axis, -1).astype(jnp.promote_types(x.dtype, dtype))
        if mask is not None and mask.ndim == x.ndim:
            mask = jnp.moveaxis(mask, self.axis, -1).squeeze(-1)

        shape, stats_dtype = (x.shape[-1],), statistics_dtype(x)
        scale = (
            self.param("scale", self.scale_init, shape, self.param_dtype)
            if self.use_scale
            else None
        )
        bias = (
            self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None
        )
        mean: Any = self.variable("batch_stats", "mean", jnp.zeros, shape, stats_dtype)
        var: Any = self.variable("batch_stats", "var", jnp.ones, shape, stats_dtype)
        stats = BatchStats(mean.value, var.value)

        if use_running_average or (self.is_initializing() and math.prod(x.shape[:-1]) < 2):
            y = batch_norm_eval(x, scale, bias, stats, epsilon=self.epsilon)
        else:
            y, stats = batch_norm_train(
                x,
                scale,
                bias,
                stats,
                momentum=self.momentum,
                epsilon=self.epsilon,
                ddof=self.ddof,
                mask=mask,
                axis_name=None if self.is_initializing() else self.axis_name,
            )
            if not self.is_initializing():
                mean.value, var.value = stats.mean, stats.var
        return jnp.moveaxis(y, -1, self.axis).astype(dtype)

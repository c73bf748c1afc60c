"""Cross entropy and accuracy, each example on its own."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bnjax.moments import statistics_dtype

AnyArray = Array | np.ndarray


def cross_entropy(logits: Array, labels: AnyArray) -> Array:
    """`log(sum(exp(logits))) - logits[label]` of each example, in nats.

    Picking the logit by comparison, the gradient needs no scatter, which on a CPU takes longer than
    the matrix product before it.

    Args:
        logits: `[N, classes]` floating point; float32 at least while losses are computed.
        labels: `[N]` integers. One that is no class makes its loss NaN.

    Returns:
        `[N]` losses.

    Raises:
        ValueError: if labels are no integers, or not one for each row of the logits.

    Example:
        >>> print(cross_entropy(jnp.zeros((1, 10)), jnp.array([3])).round(4))
        [2.3026]
    """
    integers = jnp.issubdtype(labels.dtype, jnp.integer) or labels.dtype == bool
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not integers:
        raise ValueError(
            f"labels are {labels.dtype}{list(labels.shape)} and logits of shape {logits.shape}: "
            "expected integers [N] and logits [N, classes]"
        )
    classes, labels = _classes_and_labels(logits, labels)
    logits = logits.astype(statistics_dtype(logits))
    shifted = logits - lax.stop_gradient(logits.max(axis=1, keepdims=True))
    own = jnp.where(classes[None] == labels[:, None], shifted, 0).sum(axis=1)
    own = jnp.where((labels >= 0) & (labels < len(classes)), own, jnp.nan)
    return jnp.log(jnp.exp(shifted).sum(axis=1)) - own


def is_first_largest(logits: Array, labels: AnyArray) -> Array:
    """`argmax(logits) == labels`, and False where NaN stands in the way.

    XLA's argmax takes longer on a CPU than the rest of the forward pass of a wide output layer.
    """
    classes, labels = _classes_and_labels(logits, labels)
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = classes[None] < labels[:, None]
    beaten = jnp.where(earlier, logits < own, logits <= own)
    return beaten.all(axis=1)


def _classes_and_labels(logits: Array, labels: AnyArray) -> tuple[Array, AnyArray]:
    """All classes and the labels as integers of one dtype, in which both are exact."""
    wide = labels.dtype if labels.dtype.itemsize >= 4 else np.int32
    dtype = jax.dtypes.canonicalize_dtype(wide)
    return jnp.arange(logits.shape[1], dtype=dtype), labels.astype(dtype)

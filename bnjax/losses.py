"""Cross entropy and accuracy.

On a CPU XLA's argmax, and the scatter that is the gradient of picking a logit by its index, take
longer than the matrix products of a wide output layer. Comparing logits needs neither.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bnjax.moments import statistics_dtype

AnyArray = Array | np.ndarray


class Metrics(NamedTuple):
    """Sums over examples, to be divided only at the very end.

    Attributes:
        loss: sum of the cross entropies, in nats.
        correct: number of examples whose largest logit is their label's; None where nobody counted.
        examples: number of examples.
    """

    loss: Array
    correct: Array
    examples: Array


def sum_metrics(logits: Array, labels: AnyArray) -> Metrics:
    """The metrics of logits `[N, classes]` and labels `[N]`, as `cross_entropy` takes them.

    Of equal logits the first is the largest, and none is where there is NaN.
    """
    losses = cross_entropy(logits, labels)
    classes, labels = _classes_and_labels(logits, labels)
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = classes[None] < labels[:, None]
    correct = jnp.where(earlier, logits < own, logits <= own).all(axis=1)
    examples = jnp.asarray(labels.shape[0], jnp.int32)
    return Metrics(losses.sum(), jnp.sum(correct, dtype=jnp.int32), examples)


def cross_entropy(logits: Array, labels: AnyArray) -> Array:
    """`log(sum(exp(logits))) - logits[label]` of each example, in nats.

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


def _classes_and_labels(logits: Array, labels: AnyArray) -> tuple[Array, AnyArray]:
    """All classes and the labels as integers of one dtype, in which both are exact."""
    wide = labels.dtype if labels.dtype.itemsize >= 4 else np.int32
    dtype = jax.dtypes.canonicalize_dtype(wide)
    return jnp.arange(logits.shape[1], dtype=dtype), labels.astype(dtype)

"""What a training step takes and gives: a batch of examples, a state, sums."""

import zlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state
from jax import Array

from bnjax.losses import AnyArray

KEY_KIND = "threefry2x32"


class Batch(NamedTuple):
    """Examples side by side.

    Attributes:
        images: `[N, ...]` uint8 in 0..255, or floating point as the module takes it.
        labels: `[N]` integer classes.
    """

    images: AnyArray
    labels: AnyArray


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


class TrainState(train_state.TrainState):
    """Flax's training state (`step`, `params`, `opt_state`) with what it lacks.

    Attributes:
        batch_stats: the running statistics.
        dropout_key: `[2]` uint32, a threefry key that each step folds with its number; None for
            modules that draw nothing.
    """

    batch_stats: Any
    dropout_key: Array | None = None

    @property
    def variables(self) -> dict[str, Any]:
        """What `module.apply` takes: `{"params": ..., "batch_stats": ...}`."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def create_state(
    module: nn.Module, optimizer: optax.GradientTransformation, key: Array, images: AnyArray
) -> TrainState:
    """Initial parameters, running statistics and optimizer state.

    Args:
        module: called as `module.apply(variables, images, train=...)`.
        optimizer: an optax gradient transformation.
        key: a JAX random key; decides the parameters and what dropout drops.
        images: `[N, ...]`, any examples of the right shape.

    Example:
        >>> from bnjax.models import MLP
        >>> state = create_state(MLP((5,), 2), optax.sgd(0.1), jax.random.key(0), jnp.zeros((4, 3)))
        >>> state.params["Dense_0"]["kernel"].shape
        (3, 5)
    """
    dropout_key = jax.random.fold_in(key, zlib.crc32(b"dropout"))
    variables = module.init(key, to_float(images), train=True)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        apply_fn=module.apply,
        params=variables["params"],
        tx=optimizer,
        opt_state=optimizer.init(variables["params"]),
        batch_stats=variables.get("batch_stats", {}),
        dropout_key=jax.random.bits(dropout_key, (2,), jnp.uint32),
    )


def to_float(images: AnyArray) -> AnyArray:
    """uint8 in 0..255 becomes float32 in [0, 1], as torchvision's `ToTensor`; floats stay.

    Raises:
        ValueError: if they are anything else: other integers do not say what they are out of.

    Example:
        >>> print(to_float(jnp.array([0, 255], jnp.uint8)))
        [0. 1.]
    """
    dtype = images.dtype if isinstance(images, AnyArray) else None
    if dtype == jnp.uint8:
        return images.astype(jnp.float32) / 255
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        found = f"a {type(images).__name__}" if dtype is None else f"{dtype}{list(images.shape)}"
        raise ValueError(
            f"images are {found}: expected an array of uint8 in 0..255, which are divided by 255, "
            "or of floating point, which stays as it is"
        )
    return images

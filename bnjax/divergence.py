"""Where a network that diverged was not finite for the first time."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bnjax import training
from bnjax.layer_taps import watch
from bnjax.training import AnyArray, Batch, TrainState

LOSS = "loss"


def first_step(losses: AnyArray) -> int | None:
    """The first step, counted from 1, whose loss is not finite; None if all are.

    Args:
        losses: `[steps]`.

    Example:
        >>> first_step(np.array([0.7, np.inf, np.nan]))
        2
    """
    lost = ~np.isfinite(np.asarray(losses))
    return int(lost.argmax()) + 1 if lost.any() else None


def replay(
    state: TrainState, examples: Batch, key: Array, *, step: int, batch_size: int, shares: int = 1
) -> tuple[TrainState, Batch]:
    """Goes through an epoch again up to a step: the state before it, and its batch.

    That is another program than the one that trained, and may round differently. It is compiled
    once for all steps.

    Args:
        state: before the epoch.
        examples: the training set.
        key: decided the order of the epoch.
        step: counts from 1.
        batch_size: examples per step.
        shares: parts of each batch that were normalized on their own.
    """
    order = training.draw_order(key, len(examples.labels))
    state = _advance(state, examples, order, step - 1, batch_size, shares)
    return state, training.take(examples, order[(step - 1) * batch_size : step * batch_size])


@partial(jax.jit, static_argnames=("batch_size", "shares"))
def _advance(
    state: TrainState, examples: Batch, order: Array, steps: int, batch_size: int, shares: int
) -> TrainState:
    def advance(done: Array, state: TrainState) -> TrainState:
        index = lax.dynamic_slice(order, (done * batch_size,), (batch_size,))
        return _train_step(state, training.take(examples, index), shares)

    return lax.fori_loop(0, steps, advance, state)


def _train_step(state: TrainState, batch: Batch, shares: int) -> TrainState:
    if shares == 1:
        return training.train_step(state, batch)[0]
    parts = jax.tree.map(lambda a: a.reshape(shares, -1, *a.shape[1:]), batch)
    step = jax.vmap(
        partial(training.train_step, axis_name="data"),
        in_axes=(None, 0),
        out_axes=None,
        axis_name="data",
    )
    return step(state, parts)[0]


def first_layer(state: TrainState, batch: Batch, *, train: bool) -> str | None:
    """The first layer whose output is not finite in the forward pass of a batch.

    Args:
        state: of the network.
        batch: any examples.
        train: whether the network normalizes by the batch and drops, as in training.

    Returns:
        The layer's path, such as `"Dense_3"`; "loss" if all layers are finite and the loss is not;
        None if everything is.

    Raises:
        ValueError: if a layer is called inside `nn.scan`, `nn.remat` or the like.

    Example:
        >>> import optax
        >>> from bnjax.models import MLP
        >>> batch = Batch(jnp.ones((4, 3)), jnp.zeros(4, jnp.int32))
        >>> state = training.create_state(MLP((5,), 2), optax.sgd(1.0), jax.random.key(0), batch[0])
        >>> params = jax.tree.map(lambda a: a * jnp.inf, state.params)
        >>> first_layer(state.replace(params=params), batch, train=True)
        'Dense_0'
    """
    names: list[str] = []
    finite, loss = jax.jit(partial(_look, names, train))(state, batch)
    lost = [name for name, ok in zip(names, np.asarray(finite), strict=True) if not ok]
    if lost:
        return lost[0]
    return None if np.isfinite(loss) else LOSS


def _look(names: list[str], train: bool, state: TrainState, batch: Batch) -> tuple[Array, Array]:
    """Whether each layer is finite, in the order in which they end, and the loss of the batch."""
    finite: list[Array] = []

    def note(module: nn.Module, x: Any, y: Any) -> Any:
        names.append("/".join(module.path) or "logits")
        finite.append(jnp.array([jnp.isfinite(a).all() for a in jax.tree.leaves(y)]).all())
        return y

    with watch(note):
        logits, _ = training.forward(state, batch.images, train=train)
    return jnp.stack(finite), training.cross_entropy(logits, batch.labels).mean()

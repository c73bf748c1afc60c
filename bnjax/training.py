"""Training one network: pure functions from state and batch to state and sums.

A batch, like the whole dataset, is a `Batch` of arrays. The functions know nothing about where it
came from nor what the module is, beyond `module.apply(variables, images, train=...)`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from bnjax.losses import AnyArray, cross_entropy, is_first_largest
from bnjax.train_state import KEY_KIND, Batch, Metrics, TrainState, create_state, to_float

__all__ = [
    "AnyArray",
    "Batch",
    "Metrics",
    "TrainState",
    "create_state",
    "cross_entropy",
    "draw_order",
    "eval_step",
    "evaluate",
    "forward",
    "take",
    "to_float",
    "train_epoch",
    "train_step",
    "vary_with",
]

State = TypeVar("State")


@partial(jax.jit, static_argnames="axis_name")
def train_step(
    state: TrainState, batch: Batch, *, axis_name: str | None = None
) -> tuple[TrainState, Metrics]:
    """One optimizer step on the mean cross entropy of the batch, in training mode.

    Args:
        state: the state before the step.
        batch: `[B, ...]` images and `[B]` labels.
        axis_name: a mapped axis over whose devices batches of the same size are spread, as PyTorch
            distributes training: gradients are averaged, each device normalizes by its own
            examples and drops on its own, and the running statistics are those of the first.

    Returns:
        The state after the step, with updated running statistics, and the metrics of the forward
        pass that the gradient came from.

    Example:
        >>> import optax
        >>> from bnjax.models import MLP
        >>> batch = Batch(jnp.zeros((4, 3)), jnp.array([0, 1, 0, 1]))
        >>> state = create_state(MLP((5,), 2), optax.sgd(0.1), jax.random.key(0), batch.images)
        >>> state, metrics = train_step(state, batch)
        >>> int(state.step), int(metrics.examples)
        (1, 4)
    """

    own = state.replace(params=vary_with(batch, state.params))
    if axis_name is not None:
        own = _fold_dropout(own, lax.axis_index(axis_name))
        first = lax.axis_index(axis_name) == 0

    def loss_fn(params: Any) -> tuple[Array, tuple[Metrics, Any]]:
        logits, updates = forward(own.replace(params=params), batch.images, train=True)
        metrics = _metrics(logits, batch.labels)
        return metrics.loss / metrics.examples.astype(metrics.loss.dtype), (metrics, updates)

    gradients, (metrics, updates) = jax.grad(loss_fn, has_aux=True)(own.params)
    batch_stats = _in_containers_of(state.batch_stats, updates.get("batch_stats", {}))
    if axis_name is not None:
        gradients = lax.pmean(gradients, axis_name)
        firsts = jax.tree.map(lambda a: jnp.where(first, a, jnp.zeros_like(a)), batch_stats)
        metrics, batch_stats = lax.psum((metrics, firsts), axis_name)
    with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic needs it
        return state.apply_gradients(grads=gradients, batch_stats=batch_stats), metrics


def vary_with(batch: Batch, tree: State) -> State:
    """The same arrays as each device's own, where devices have batches of their own.

    `shard_map` with its default checks would add up gradients in what all devices share.
    """
    some = (batch.labels == 0).any()
    return jax.tree.map(lambda a: jnp.where(some, a, a), tree)


def _in_containers_of(before: Any, after: Any) -> Any:
    """Statistics after a step in the mappings of those before, as a scan needs them."""
    old, new = (
        {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
        for leaves in map(jax.tree.leaves_with_path, (before, after))
    )
    if missing := sorted(new.keys() - old.keys()):
        raise ValueError(
            f"batch_stats of the state lack {', '.join(missing)}, which the module updates in "
            "training: begin with those that its init or create_state gives"
        )
    return jax.tree.unflatten(jax.tree.structure(before), {**old, **new}.values())


def forward(state: TrainState, images: AnyArray, *, train: bool) -> tuple[Array, dict[str, Any]]:
    """Logits `[B, classes]` of a batch, and the collections that training mode updates.

    Args:
        state: of the network; in training mode its `step` decides what dropout drops.
        images: `[B, ...]`.
        train: whether to normalize by the batch and to drop.
    """
    images = to_float(images)
    if not train:
        return state.apply_fn(state.variables, images, train=False), {}
    rngs = {}
    if state.dropout_key is not None:
        key = jax.random.wrap_key_data(state.dropout_key, impl=KEY_KIND)
        rngs["dropout"] = jax.random.fold_in(key, state.step)
    return state.apply_fn(state.variables, images, train=True, mutable=["batch_stats"], rngs=rngs)


def _fold_dropout(state: TrainState, number: Array) -> TrainState:
    if state.dropout_key is None:
        return state
    key = jax.random.fold_in(jax.random.wrap_key_data(state.dropout_key, impl=KEY_KIND), number)
    return state.replace(dropout_key=jax.random.key_data(key))


@jax.jit
def eval_step(state: TrainState, batch: Batch) -> Metrics:
    """Metrics of a batch in evaluation mode: running statistics, no update."""
    logits, _ = forward(state, batch.images, train=False)
    return _metrics(logits, batch.labels)


def draw_order(key: Array, count: int) -> Array:
    """A random order of so many examples, `[count]`, as `train_epoch` takes them."""
    # One sort of random numbers; `jax.random.permutation` sorts twice, for the rare ties.
    return jnp.argsort(jax.random.bits(key, (count,), jnp.uint32))


def take(examples: Batch, index: Array) -> Batch:
    """The examples at these places."""
    return Batch(*(a[index] for a in examples))


@partial(jax.jit, static_argnames=("batch_size", "drop_last", "step", "take"))
def train_epoch(
    state: State,
    examples: Batch,
    key: Array,
    *,
    batch_size: int,
    drop_last: bool = True,
    step: Callable[[State, Batch], tuple[State, Any]] = train_step,
    take: Callable[[Batch, Array], Batch] = take,
) -> tuple[State, Any]:
    """Every example once, in an order drawn from `key`, as one compiled scan.

    Args:
        state: the state before the epoch, of whatever type `step` takes.
        examples: the training set, resident on the device.
        key: decides the order and nothing else.
        batch_size: examples per step, at most the number of examples.
        drop_last: leave out what does not fill a batch; otherwise it is one more, smaller step.
        step: `(state, batch) -> (state, metrics)`.
        take: `(examples, index) -> batch`.

    Returns:
        The state after the epoch and the metrics of the steps, stacked along the first axis.

    Raises:
        ValueError: if there are fewer examples than `batch_size`, or not as many images as labels.

    Example:
        >>> import optax
        >>> from bnjax.models import MLP
        >>> batch = Batch(jnp.zeros((4, 3)), jnp.array([0, 1, 0, 1]))
        >>> state = create_state(MLP((5,), 2), optax.sgd(0.1), jax.random.key(0), batch.images)
        >>> state, steps = train_epoch(state, batch, jax.random.key(1), batch_size=2)
        >>> int(state.step), steps.loss.shape
        (2, (2,))
    """
    count = _count(examples)
    if not 1 <= batch_size <= count:
        raise ValueError(
            f"batch_size is {batch_size}: expected 1 to {count}, the number of examples"
        )
    steps, rest = divmod(count, batch_size)
    order = draw_order(key, count)
    batches = order[: steps * batch_size].reshape(steps, batch_size)
    state, metrics = lax.scan(lambda s, index: step(s, take(examples, index)), state, batches)
    if not drop_last and rest:
        state, last = step(state, take(examples, order[-rest:]))
        metrics = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), metrics, last)
    return state, metrics


@partial(jax.jit, static_argnames=("batch_size", "step"))
def evaluate(
    state: TrainState,
    examples: Batch,
    *,
    batch_size: int = 1000,
    step: Callable[[TrainState, Batch], Metrics] = eval_step,
) -> Metrics:
    """Metrics of every example once, in evaluation mode; the last short batch counts as well.

    Args:
        state: what to evaluate.
        examples: the whole set, resident on the device.
        batch_size: examples per step. The result does not depend on it but for rounding.
        step: `(state, batch) -> metrics`.

    Raises:
        ValueError: if `batch_size` is below 1, or there are not as many images as labels.

    Example:
        >>> import optax
        >>> from bnjax.models import MLP
        >>> batch = Batch(jnp.zeros((4, 3)), jnp.array([0, 1, 0, 1]))
        >>> state = create_state(MLP((5,), 2), optax.sgd(0.1), jax.random.key(0), batch.images)
        >>> int(evaluate(state, batch, batch_size=3).examples)
        4
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: expected at least 1")
    count = _count(examples)
    if not isinstance(count, int):
        return step(state, examples)  # in an export, whatever there will be
    steps, rest = divmod(count, batch_size)
    whole = jax.tree.map(
        lambda a: a[: steps * batch_size].reshape(steps, batch_size, *a.shape[1:]), examples
    )
    metrics = lax.map(lambda batch: step(state, batch), whole)
    total = jax.tree.map(lambda a: a.sum(0, dtype=a.dtype), metrics)
    if rest:
        last = step(state, jax.tree.map(lambda a: a[-rest:], examples))
        total = jax.tree.map(jnp.add, total, last)
    return total


def _count(examples: Batch) -> int:
    images, labels = examples.images.shape[0], examples.labels.shape[0]
    if images != labels:
        raise ValueError(
            f"{images} images and {labels} labels: expected as many of one as of the other"
        )
    return labels


def _metrics(logits: Array, labels: AnyArray) -> Metrics:
    losses = cross_entropy(logits, labels)
    correct = jnp.sum(is_first_largest(logits, labels), dtype=jnp.int32)
    return Metrics(losses.sum(), correct, jnp.asarray(labels.shape[0], jnp.int32))

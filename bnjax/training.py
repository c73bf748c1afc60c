"""Training one network: pure functions from state and batch to state and sums.

A batch, like the whole dataset, is a `Batch` of arrays. The functions know nothing about where it
came from nor what the module is, beyond `module.apply(variables, images, train=...)`.

Example:
    >>> from bnjax.models import MLP
    >>> batch = Batch(jnp.zeros((4, 3)), jnp.array([0, 1, 0, 1]))
    >>> state = create_state(MLP((5,), 2), optax.sgd(0.1), jax.random.key(0), batch.images)
    >>> state, metrics = train_step(state, batch)
    >>> state, steps = train_epoch(state, batch, jax.random.key(1), batch_size=2)
    >>> int(state.step), steps.loss.shape, int(evaluate(state, batch).examples)
    (3, (2,), 4)
"""

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state
from jax import Array, lax

from bnjax.losses import AnyArray, Metrics, sum_metrics

State = TypeVar("State")


class Batch(NamedTuple):
    """Examples side by side.

    Attributes:
        images: `[N, ...]` uint8 in 0..255, or floating point as the module takes it.
        labels: `[N]` integer classes.
    """

    images: AnyArray
    labels: AnyArray


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

    The key, of any kind, decides the parameters and what dropout drops; the images `[N, ...]` are
    any examples of the right shape.
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


@partial(jax.jit, static_argnames="axis_name")
def train_step(
    state: TrainState, batch: Batch, *, axis_name: str | None = None
) -> tuple[TrainState, Metrics]:
    """One optimizer step on the mean cross entropy of the batch, in training mode.

    The devices of a mapped axis `axis_name` have batches of the same size each, as PyTorch
    distributes training: gradients are averaged, each device normalizes by its own examples and
    drops on its own, and the running statistics are those of the first.

    Returns:
        The state after the step, with updated running statistics in the dtypes that they had, and
        the metrics of the forward pass that the gradient came from.
    """
    own = state.replace(params=vary_with(batch, state.params))
    if axis_name is not None and own.dropout_key is not None:
        key = _fold(own.dropout_key, lax.axis_index(axis_name))
        own = own.replace(dropout_key=jax.random.key_data(key))

    def loss_fn(params: Any) -> tuple[Array, tuple[Metrics, Any]]:
        logits, updates = forward(own.replace(params=params), batch.images, train=True)
        metrics = sum_metrics(logits, batch.labels)
        return metrics.loss / metrics.examples.astype(metrics.loss.dtype), (metrics, updates)

    gradients, (metrics, updates) = jax.grad(loss_fn, has_aux=True)(own.params)
    batch_stats = _update(state.batch_stats, updates.get("batch_stats", {}))
    if axis_name is not None:
        gradients = lax.pmean(gradients, axis_name)
        first = lax.axis_index(axis_name) == 0
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


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree in its order, by paths such as `params/Dense_0/kernel`."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def _update(before: Any, after: Any) -> Any:
    """Statistics after a step in the mappings and dtypes of those before, as a scan needs them."""
    old, new = by_path(before), by_path(after)
    if missing := sorted(new.keys() - old.keys()):
        raise ValueError(
            f"batch_stats of the state lack {', '.join(missing)}, which the module updates in "
            "training: begin with those that its init or create_state gives"
        )
    leaves = [new[name].astype(a.dtype) if name in new else a for name, a in old.items()]
    return jax.tree.unflatten(jax.tree.structure(before), leaves)


def _fold(dropout_key: Array, number: Array | int) -> Array:
    return jax.random.fold_in(jax.random.wrap_key_data(dropout_key, impl="threefry2x32"), number)


def forward(state: TrainState, images: AnyArray, *, train: bool) -> tuple[Array, dict[str, Any]]:
    """Logits `[B, classes]` of images `[B, ...]`, and the collections that training mode updates.

    In training mode `state.step` decides what dropout drops.
    """
    images = to_float(images)
    if not train:
        return state.apply_fn(state.variables, images, train=False), {}
    rngs = {} if state.dropout_key is None else {"dropout": _fold(state.dropout_key, state.step)}
    return state.apply_fn(state.variables, images, train=True, mutable=["batch_stats"], rngs=rngs)


@jax.jit
def eval_step(state: TrainState, batch: Batch) -> Metrics:
    """Metrics of a batch in evaluation mode: running statistics, no update."""
    logits, _ = forward(state, batch.images, train=False)
    return sum_metrics(logits, batch.labels)


def draw_order(key: Array, count: int) -> Array:
    """A random order of so many examples, `[count]`, as `train_epoch` takes them."""
    # One sort of random numbers; `jax.random.permutation` sorts twice, for the rare ties.
    return jnp.argsort(jax.random.bits(key, (count,), jnp.uint32))


def take(examples: Batch, index: AnyArray) -> Batch:
    """The examples at these places."""
    return Batch(*(a[index] for a in examples))


@partial(jax.jit, static_argnames=("batch_size", "drop_last", "step"))
def train_epoch(
    state: State,
    examples: Batch,
    key: Array,
    *,
    batch_size: int,
    drop_last: bool = True,
    step: Callable[[State, Batch], tuple[State, Any]] = train_step,
) -> tuple[State, Any]:
    """Every example once, in an order drawn from `key`, as one compiled scan.

    Args:
        state: of whatever type `step` takes.
        examples: the training set, resident on the device.
        key: decides the order and nothing else.
        batch_size: examples per step, at most the number of examples.
        drop_last: leave out what does not fill a batch; otherwise it is one more, smaller step.
        step: `(state, batch) -> (state, metrics)`.

    Returns:
        The state after the epoch and the metrics of the steps, stacked along the first axis.

    Raises:
        ValueError: if there are fewer examples than `batch_size`, or not as many images as labels.
    """
    count = _count(examples)
    if not 1 <= batch_size <= count:
        told = f"batch_size is {batch_size}: expected 1 to {count}, the number of examples"
        raise ValueError(told)
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
        state, examples: as in `train_epoch`.
        batch_size: examples per step, from 1; the result depends on it in its rounding alone.
        step: `(state, batch) -> metrics`.

    Raises:
        ValueError: if `batch_size` is below 1, or there are not as many images as labels.
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
    images, labels = (a.shape[0] for a in examples)
    if images != labels:
        raise ValueError(f"{images} images and {labels} labels: expected equally many")
    return labels

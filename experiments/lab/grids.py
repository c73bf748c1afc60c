"""Training for claims and sweeps: arms from scratch, and grids that differ in numbers alone."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from bnjax import initializers, models
from bnjax.data import Dataset
from bnjax.paired import Arm, Epoch, States, Trainer
from bnjax.training import AnyArray, Batch, TrainState, to_float
from experiments.lab import devices, metrics

ACTIVATION_NAMES = {"relu": "ReLU", "sigmoid": "sigmoid", "tanh": "tanh"}
UNIT_NORMAL = initializers.normal(1.0)
SGD = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)


class GridPoint(NamedTuple):
    """One setting of a grid.

    Attributes:
        learning_rate: of plain SGD.
        std: `(fan_in, fan_out) -> ` standard deviation of a kernel's normal initial values.
    """

    learning_rate: float
    std: Callable[[int, int], float]


def he_std(fan_in: int, fan_out: int) -> float:
    """Of `bnjax.initializers.he_normal`, for a `GridPoint`."""
    return math.sqrt(2 / fan_in)


def train(
    arms: Sequence[Arm],
    keys: Array,
    examples: Batch,
    test: Batch,
    *,
    epochs: int,
    batch_size: int,
    drop_last: bool = True,
    change: Callable[[States], States] = lambda states: states,
) -> Iterator[Epoch]:
    """Trains arms from scratch, on all devices; the arguments are those of a `Trainer`.

    Batches are of all examples where there are fewer than `batch_size`; `change` is given the
    initial states.
    """
    placements = devices.make_placements(tuple(arms), "auto", len(keys))
    batch_size = min(batch_size, len(examples.labels))
    trainer = Trainer(placements, keys, examples, test, batch_size, drop_last)
    return trainer.epochs(change(trainer.initial_states()), range(1, epochs + 1))


def train_grid(
    points: Sequence[GridPoint],
    keys: Array,
    examples: Batch,
    test: Batch,
    *,
    epochs: int,
    batch_size: int,
    at_start: Callable[[States], None] = lambda states: None,
    **fields: Any,
) -> Iterator[Epoch]:
    """An MLP with batch normalization and its twin without, trained by SGD at every point.

    All points share the keys: they differ in their numbers alone. Initial biases are 0.

    Args:
        points: C settings.
        keys: `[R]`.
        examples, test, epochs, batch_size: as in `train`.
        at_start: sees the initial states, which the first epoch is given for its own.
        fields: of the `MLP`.

    Yields:
        Epochs whose leading axis, of length C R, `by_point` unfolds.
    """
    twins = networks(kernel_init=UNIT_NORMAL, **fields)
    arms = [Arm(name, module, SGD) for name, module in twins.items()]

    def change(states: States) -> States:
        changed = {name: _scale(state, points, len(keys)) for name, state in states.items()}
        at_start(changed)
        return changed

    tiled = jnp.tile(keys, len(points))
    return train(arms, tiled, examples, test, epochs=epochs, batch_size=batch_size, change=change)


def _scale(state: TrainState, points: Sequence[GridPoint], replicates: int) -> TrainState:
    def scale(path: tuple[jax.tree_util.DictKey, ...], value: Array) -> Array:
        layer, kind = (part.key for part in path[-2:])
        if kind == "kernel":
            stds = np.repeat([point.std(*value.shape[1:]) for point in points], replicates)
            return value * stds.astype(value.dtype)[:, None, None]
        return jnp.zeros_like(value) if layer.startswith("Dense") else value

    params = jax.tree_util.tree_map_with_path(scale, state.params)
    rates = np.repeat(np.array([point.learning_rate for point in points], np.float32), replicates)
    return with_rates(state.replace(params=params), rates)


def with_rates(state: TrainState, rates: np.ndarray) -> TrainState:
    """A state whose replicates have learning rates of their own, `[R]` float32.

    The optimizer is an `optax.inject_hyperparams`. Each state has its own copy of the rates, since
    training donates it.
    """
    opt_state = state.opt_state._replace(hyperparams={"learning_rate": jnp.array(rates)})
    return state.replace(opt_state=opt_state)


def by_point(values: np.ndarray, points: Sequence[GridPoint]) -> np.ndarray:
    """`[C R, ...]` as `[C, R, ...]`."""
    return values.reshape(len(points), -1, *values.shape[1:])


def curves(epochs: Iterable[Epoch], arms: Sequence[str]) -> metrics.Curves:
    """The metrics of these epochs, `{arm: {metric: [epochs, R]}}`."""
    return metrics.curves([line for one in epochs for line in metrics.lines_of(one, arms)], arms)


def accuracy(epoch: Epoch) -> dict[str, np.ndarray]:
    """Test accuracy of each arm after an epoch, `[R]`, in percent."""
    return {
        arm: 100 * np.asarray(test.correct, np.float64) / np.asarray(test.examples)
        for arm, test in epoch.test.items()
    }


def networks(**fields: Any) -> dict[str, models.MLP]:
    """An MLP with batch normalization and its twin without."""
    norms = {"bn": "batch", "no_bn": None}
    return {arm: models.MLP(norm=norm, **fields) for arm, norm in norms.items()}


def epochs_of(steps: int, batch_size: int, examples: Batch) -> int:
    """Epochs that come nearest to so many steps, at least one."""
    return max(1, round(steps * batch_size / len(examples.labels)))


def unstack(state: TrainState) -> list[TrainState]:
    """The replicates of an arm's state, one by one."""
    return [jax.tree.map(lambda a, k=k: a[k], state) for k in range(np.size(state.step))]


def batches(dataset: Dataset) -> tuple[Batch, Batch]:
    """The training set and the test set."""
    return Batch(*dataset[1:3]), Batch(*dataset[3:5])


def head(batch: Batch, count: int) -> Batch:
    """The first examples of a set."""
    return Batch(batch.images[:count], batch.labels[:count])


@partial(jax.jit, static_argnames=("size", "train"))
def predict(
    state: TrainState, images: Array, size: int, *, train: bool, key: Array | None = None
) -> Array:
    """Classes `[n]` of the images, `size` at a time, without those that fill no group.

    Args:
        state: the network.
        images: `[N, ...]`, taken in their order.
        size: images in a batch.
        train: whether to predict in training mode.
        key: for dropout in training mode.
    """
    rngs = {} if key is None else {"dropout": key}

    def classes(group: Array) -> Array:
        x = to_float(group)
        logits, _ = state.apply_fn(
            state.variables, x, train=train, mutable=["batch_stats"], rngs=rngs
        )
        return logits.argmax(axis=1)

    whole = len(images) // size * size
    return jax.lax.map(classes, images[:whole].reshape(-1, size, *images.shape[1:])).ravel()


def accuracy_of(classes: Array, labels: AnyArray) -> float:
    """Share of the classes `[n]` that are the first n labels."""
    return float((classes == labels[: len(classes)]).mean())

"""Training for claims and sweeps: arms from scratch, and grids that differ in numbers alone."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from bnjax import initializers, models
from bnjax.paired import Arm, Epoch, States, Trainer
from bnjax.training import AnyArray, Batch, TrainState, to_float
from experiments.lab import devices

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
    """Trains arms from scratch, on all devices.

    Args:
        arms: what to train.
        keys: `[R]`, one for each replicate.
        examples: the training set.
        test: the test set.
        epochs: times through the training set.
        batch_size: examples per step; all of them where there are fewer.
        drop_last: leave out what does not fill a batch.
        change: what to do to the initial states.
    """
    trainer = Trainer(
        devices.make_placements(tuple(arms), "auto", len(keys)),
        keys,
        examples,
        test,
        batch_size=min(batch_size, len(examples.labels)),
        drop_last=drop_last,
    )
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
    **fields: object,
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

    keys_of_all = jnp.tile(keys, len(points))
    sizes: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size}
    return train(arms, keys_of_all, examples, test, change=change, **sizes)


def _scale(state: TrainState, points: Sequence[GridPoint], replicates: int) -> TrainState:
    params = flatten_dict(state.params)
    for path, value in params.items():
        if path[-1] == "kernel":
            stds = np.repeat([point.std(*value.shape[1:]) for point in points], replicates)
            params[path] = value * stds.astype(value.dtype)[:, None, None]
        elif path[-2].startswith("Dense"):
            params[path] = jnp.zeros_like(value)
    rates = np.repeat(np.array([point.learning_rate for point in points], np.float32), replicates)
    return with_rates(state.replace(params=unflatten_dict(params)), rates)


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


def accuracy(epoch: Epoch) -> dict[str, np.ndarray]:
    """Test accuracy of each arm after an epoch, `[R]`, in percent."""
    return {
        arm: 100 * np.asarray(metrics.correct, np.float64) / np.asarray(metrics.examples)
        for arm, metrics in epoch.test.items()
    }


def networks(**fields: object) -> dict[str, models.MLP]:
    """An MLP with batch normalization and its twin without."""
    return {
        "bn": models.MLP(norm="batch", **fields),  # type: ignore[arg-type]
        "no_bn": models.MLP(norm=None, **fields),  # type: ignore[arg-type]
    }


def epochs_of(steps: int, batch_size: int, examples: Batch) -> int:
    """Epochs that come nearest to so many steps, at least one."""
    return max(1, round(steps * batch_size / len(examples.labels)))


def unstack(state: TrainState) -> list[TrainState]:
    """The replicates of an arm's state, one by one."""
    return [jax.tree.map(lambda a, k=k: a[k], state) for k in range(np.size(state.step))]


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

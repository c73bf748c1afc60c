"""Grids of settings that differ in numbers alone, each trained as one program."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from bnjax import initializers, models
from bnjax.diagnostics import Variables
from bnjax.paired import Arm, Epoch, States
from bnjax.training import Batch, TrainState
from experiments.lab.scratch import train, with_rates

T = TypeVar("T")

SGD = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)


class GridPoint(NamedTuple):
    """One setting of a grid.

    Attributes:
        learning_rate: of plain SGD.
        std: `(fan_in, fan_out) -> ` standard deviation of a kernel's normal initial values.
    """

    learning_rate: float
    std: Callable[[int, int], float]


def networks(**fields: Any) -> dict[str, models.MLP]:
    """An MLP with batch normalization and its twin without."""
    return {"bn": models.MLP(norm="batch", **fields), "no_bn": models.MLP(norm=None, **fields)}


def train_grid(
    points: Sequence[GridPoint],
    keys: Array,
    examples: Batch,
    test: Batch,
    *,
    epochs: int,
    batch_size: int,
    **fields: Any,
) -> Iterator[Epoch]:
    """`networks`, trained by SGD at every point from normal kernels and biases of 0.

    All points share the keys: they differ in their numbers alone.

    Args:
        points: C settings.
        keys: `[R]`.
        examples, test, epochs, batch_size: as in `train`.
        fields: of the `MLP`.

    Yields:
        Epochs whose leading axis is C R long: `np.split(values, C)` is `[R, ...]` of each point.
    """
    twins = networks(kernel_init=initializers.normal(1.0), **fields)
    arms = [Arm(name, module, SGD) for name, module in twins.items()]

    def change(states: States) -> States:
        return {name: _scale(state, points, len(keys)) for name, state in states.items()}

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


def accuracy(epoch: Epoch) -> dict[str, np.ndarray]:
    """Test accuracy of each arm after an epoch, `[R]`, in percent."""
    return {
        arm: 100 * np.asarray(test.correct, np.float64) / np.asarray(test.examples)
        for arm, test in epoch.test.items()
    }


def look_into(
    probe: Callable[..., Any], twins: Mapping[str, nn.Module], states: States, batch: Batch
) -> dict[str, Any]:
    """What a probe, as those of `bnjax.diagnostics`, returns for each arm: arrays `[R, ...]`."""
    return {arm: _look(probe, model, states[arm].variables, batch) for arm, model in twins.items()}


@partial(jax.jit, static_argnums=(0, 1))
def _look(probe: Callable[..., Any], model: nn.Module, variables: Variables, batch: Batch) -> Any:
    return jax.lax.map(lambda one: probe(model, one, batch), variables)


def stack(found: Iterable[T]) -> T:
    """Arrays `[R, ...]` that were found n times, as after every epoch, as `[R, n, ...]`."""
    return jax.tree.map(lambda *arrays: np.stack(arrays, axis=1), *found)


def epochs_of(steps: int, batch_size: int, examples: Batch) -> int:
    """Epochs that come nearest to so many steps, at least one."""
    return max(1, round(steps * batch_size / len(examples.labels)))

"""Arms and replicates: networks that differ in one thing, trained on the same batches.

The state of a run is one pytree, `{arm name: TrainState}`, in which every leaf has a leading axis
over replicates, also when there is one. All randomness is a function of the replicate's key, a
purpose and counters: a run can be continued from its state and the number of epochs done, and arms
meet the same batches also where different programs train them on different devices.
"""

import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jax.stages import Compiled

from bnjax import training
from bnjax.parallel.mesh import constrain, map_replicates, replicate_data
from bnjax.training import AnyArray, Batch, Metrics, TrainState

States = dict[str, TrainState]

T = TypeVar("T")


@dataclass(frozen=True)
class Arm:
    """One side of the comparison.

    Attributes:
        name: its name in states, metrics and files.
        module: called as `module.apply(variables, images, train=...)`.
        optimizer: an optax gradient transformation.
    """

    name: str
    module: nn.Module
    optimizer: optax.GradientTransformation


class Lane(NamedTuple):
    """Arms that one program trains together, and the mesh on which it does."""

    arms: tuple[Arm, ...]
    mesh: Mesh


class Epoch(NamedTuple):
    """What one epoch left behind.

    Attributes:
        number: counts from 1.
        states: the states after the epoch. The next epoch donates them: copy what should stay.
        steps: per arm, metrics of each training step, `[R, steps]`, without `correct`: to count it
            would take a twentieth of the training.
        train: per arm, evaluation-mode metrics of the whole training set, `[R]`.
        test: per arm, evaluation-mode metrics of the whole test set, `[R]`.
        seconds: time that training took for all arms and replicates, without evaluation or
            compilation.
    """

    number: int
    states: States
    steps: dict[str, Metrics]
    train: dict[str, Metrics]
    test: dict[str, Metrics]
    seconds: float


def replicate_keys(seed: int, replicates: int) -> Array:
    """The keys `[R]` of the replicates: `fold_in(key(seed), k)`, whatever their number."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(replicates))


def derive(key: Array, purpose: str, *counters: Array | int) -> Array:
    """A key for one purpose, folded with each counter in turn."""
    key = jax.random.fold_in(key, zlib.crc32(purpose.encode()))
    for counter in counters:
        key = jax.random.fold_in(key, counter)
    return key


def create_states(
    lanes: Sequence[Lane], keys: Array, images: AnyArray, *, shared_init: bool = False
) -> States:
    """The initial state of every arm and replicate.

    Args:
        lanes: the arms and where they live.
        keys: `[R]`, from `replicate_keys`.
        images: `[N, ...]`, any examples of the right shape.
        shared_init: draw all arms from one key, so that layers of the same name, shape and
            initializer start from the same parameters.
    """

    def create(lane: Lane) -> States:
        return _create(lane.arms, lane.mesh, shared_init, keys, images)

    if _take_turns(lanes):
        return _merge(map(create, lanes))
    with ThreadPoolExecutor() as pool:
        return _merge(pool.map(create, lanes))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _create(
    arms: tuple[Arm, ...], mesh: Mesh, shared_init: bool, keys: Array, images: AnyArray
) -> States:
    def create(key: Array, images: Array) -> States:
        init_keys = {
            arm: derive(key, "init" if shared_init else f"init {arm.name}") for arm in arms
        }
        return {
            arm.name: training.create_state(arm.module, arm.optimizer, init_key, images)
            for arm, init_key in init_keys.items()
        }

    return map_replicates(create, mesh, (keys,), (images,))


def train_step(
    states: States, batch: Batch, *, axis_name: str | None = None
) -> tuple[States, dict[str, Metrics]]:
    """One step of every arm of one replicate on the same batch."""
    results = {
        name: training.train_step(state, batch, axis_name=axis_name)
        for name, state in states.items()
    }
    return (
        {name: state for name, (state, _) in results.items()},
        {name: metrics._replace(correct=None) for name, (_, metrics) in results.items()},
    )


@partial(
    jax.jit,
    static_argnames=("batch_size", "drop_last", "mesh", "statistics"),
    donate_argnames="states",
)
def train_epoch(
    states: States,
    keys: Array,
    epoch: Array | int,
    examples: Batch,
    *,
    batch_size: int,
    drop_last: bool,
    mesh: Mesh,
    statistics: str = "global",
) -> tuple[States, dict[str, Metrics]]:
    """One epoch of arms and replicates; each replicate has its own order of the examples.

    Args:
        states: the states before the epoch; they are donated and must not be used again.
        keys: `[R]`, from `replicate_keys`.
        epoch: counts from 1.
        examples: the training set.
        batch_size: examples per step.
        drop_last: leave out what does not fill a batch.
        mesh: where to compute.
        statistics: "global", of the whole batch wherever its examples are, or "local", of the
            examples of each device of the axis `data` on their own.

    Returns:
        The states after the epoch, and per arm the metrics of each step, `[R, steps]`.
    """

    def train(states: States, key: Array, epoch: Array, examples: Batch):
        return training.train_epoch(
            states,
            examples,
            derive(key, "order", epoch),
            batch_size=batch_size,
            drop_last=drop_last,
            step=_local_step(mesh) if statistics == "local" else train_step,
            take=partial(_take, mesh),
        )

    return map_replicates(train, mesh, (states, keys), (epoch, examples))


def _local_step(mesh: Mesh) -> Callable[[States, Batch], tuple[States, dict[str, Metrics]]]:
    return jax.shard_map(
        partial(train_step, axis_name="data"),
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
        axis_names={"data"},
        check_vma=False,
    )


def _take(mesh: Mesh, examples: Batch, index: Array) -> Batch:
    return constrain(training.take(examples, constrain(index, mesh)), mesh, "data")


@partial(jax.jit, static_argnames="mesh")
def evaluate(states: States, examples: Batch, *, mesh: Mesh) -> dict[str, Metrics]:
    """Evaluation-mode metrics `[R]` of every arm over all examples."""

    def evaluate_arms(states: States, examples: Batch) -> dict[str, Metrics]:
        def step(state: TrainState, batch: Batch) -> Metrics:
            return training.eval_step(state, constrain(batch, mesh, "data"))

        return {
            name: training.evaluate(state, examples, step=step) for name, state in states.items()
        }

    return map_replicates(evaluate_arms, mesh, (states,), (examples,))


def run(
    lanes: Sequence[Lane],
    states: States,
    keys: Array,
    train: Batch,
    test: Batch,
    *,
    epochs: range,
    batch_size: int,
    drop_last: bool = True,
    statistics: str = "global",
) -> Iterator[Epoch]:
    """Trains all arms and replicates epoch by epoch and evaluates each; lanes run side by side.

    Args:
        lanes: the arms and where they live.
        states: from `create_states` or a checkpoint; they are donated to the first epoch.
        keys: `[R]`, from `replicate_keys`.
        train: the training set.
        test: the test set.
        epochs: which to run; they count from 1.
        batch_size: examples per step.
        drop_last: leave out what does not fill a batch.
        statistics: as `train_epoch` has it.

    Yields:
        One `Epoch` after the other.
    """
    if not epochs:
        return

    def prepare(lane: Lane) -> _Programs:
        mine = _pick(states, lane)
        data, checked = (replicate_data(batch, lane.mesh) for batch in (train, test))
        step = train_epoch.lower(
            mine,
            keys,
            1,
            data,
            batch_size=batch_size,
            drop_last=drop_last,
            mesh=lane.mesh,
            statistics=statistics,
        )
        on_train, on_test = (evaluate.lower(mine, b, mesh=lane.mesh) for b in (data, checked))
        return _Programs(lane, data, checked, step.compile(), on_train.compile(), on_test.compile())

    with ThreadPoolExecutor() as pool:
        programs = list(pool.map(prepare, lanes))

    turns = _take_turns(lanes)

    def start_all(calls: Iterator[T]) -> list[T]:
        return [jax.block_until_ready(result) if turns else result for result in calls]

    for number in epochs:
        start = time.perf_counter()
        results = start_all(
            p.train_epoch(_pick(states, p.lane), keys, number, p.train) for p in programs
        )
        jax.block_until_ready(results)
        seconds = time.perf_counter() - start
        states = _merge(new for new, _ in results)
        on_train = start_all(p.evaluate_train(_pick(states, p.lane), p.train) for p in programs)
        on_test = start_all(p.evaluate_test(_pick(states, p.lane), p.test) for p in programs)
        steps = _merge(metrics for _, metrics in results)
        yield Epoch(number, states, steps, _merge(on_train), _merge(on_test), seconds)


def _take_turns(lanes: Sequence[Lane]) -> bool:
    """Whether programs that communicate would meet on the same devices, and wait for each other."""
    meshes = {lane.mesh for lane in lanes}
    return len(lanes) > len(meshes) and any(mesh.size > 1 for mesh in meshes)


class _Programs(NamedTuple):
    lane: Lane
    train: Batch
    test: Batch
    train_epoch: Compiled
    evaluate_train: Compiled
    evaluate_test: Compiled


def _pick(states: States, lane: Lane) -> States:
    return {arm.name: states[arm.name] for arm in lane.arms}


def _merge(parts: Iterable[dict[str, T]]) -> dict[str, T]:
    return {name: value for part in parts for name, value in part.items()}

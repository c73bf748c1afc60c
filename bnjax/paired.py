"""Arms and replicates: networks that differ in one thing, trained on the same batches.

The state of a run is one pytree, `{arm name: TrainState}`, in which every leaf has a leading axis
over R replicates, also when there is one. All randomness is a function of the replicate's key, a
purpose and counters: a run can be continued from its state and the number of epochs done, and arms
meet the same batches also where different programs train them on different devices.
"""

import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from bnjax import training
from bnjax.parallel.mesh import map_replicates, replicate_data, share
from bnjax.training import AnyArray, Batch, Metrics, TrainState

States = dict[str, TrainState]

T = TypeVar("T")


@dataclass(frozen=True)
class Arm:
    """One side of the comparison, by its name in states, metrics and files."""

    name: str
    module: nn.Module
    optimizer: optax.GradientTransformation


class Placement(NamedTuple):
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
        train, test: per arm, evaluation-mode metrics of the whole set, `[R]`.
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


@partial(jax.jit, static_argnums=(0, 1))
def _create(placement: Placement, shared_init: bool, keys: Array, images: AnyArray) -> States:
    def create(key: Array, images: Array) -> States:
        states = {}
        for arm in placement.arms:
            init_key = derive(key, "init" if shared_init else f"init {arm.name}")
            states[arm.name] = training.create_state(arm.module, arm.optimizer, init_key, images)
        return states

    return map_replicates(create, placement.mesh, (keys,), (images,))


def train_step(
    states: States, batch: Batch, *, axis_name: str | None = None
) -> tuple[States, dict[str, Metrics]]:
    """One step of every arm of one replicate on the same batch."""
    after, metrics = {}, {}
    for name, state in states.items():
        after[name], of_arm = training.train_step(state, batch, axis_name=axis_name)
        metrics[name] = of_arm._replace(correct=None)
    return after, metrics


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

    The states before it are donated and must not be used again; the number of the `epoch` counts
    from 1, and what else it takes is as `Trainer` has it.

    Returns:
        The states after the epoch, and per arm the metrics of each step, `[R, steps]`.
    """
    on_devices = train_step
    if statistics == "local":
        on_devices = jax.shard_map(
            partial(train_step, axis_name="data"),
            in_specs=(PartitionSpec(), PartitionSpec("data")),
            out_specs=PartitionSpec(),
            axis_names={"data"},
            check_vma=False,
        )

    def step(states: States, batch: Batch) -> Any:
        return on_devices(states, share(batch, mesh))

    def train(states: States, key: Array, epoch: Array, examples: Batch) -> Any:
        order = derive(key, "order", epoch)
        sizes = {"batch_size": batch_size, "drop_last": drop_last}
        return training.train_epoch(states, examples, order, step=step, **sizes)

    return map_replicates(train, mesh, (states, keys), (epoch, examples))


@partial(jax.jit, static_argnames="mesh")
def evaluate(states: States, examples: Batch, *, mesh: Mesh) -> dict[str, Metrics]:
    """Evaluation-mode metrics `[R]` of every arm over all examples."""

    def step(state: TrainState, batch: Batch) -> Metrics:
        return training.eval_step(state, share(batch, mesh))

    def evaluate_arms(states: States, examples: Batch) -> dict[str, Metrics]:
        return {arm: training.evaluate(states[arm], examples, step=step) for arm in states}

    return map_replicates(evaluate_arms, mesh, (states,), (examples,))


@dataclass(frozen=True)
class Trainer:
    """What training needs: from here on states go in and come out.

    Attributes:
        placements: the arms and where they live; programs run side by side.
        keys: `[R]`, from `replicate_keys`.
        train, test: the sets to train on and to test on.
        batch_size, drop_last: as `bnjax.training.train_epoch` has them.
        statistics: "global", of the whole batch wherever its examples are, or "local", of the
            examples of each device of the axis `data` on their own.
        shared_init: draw all arms from one key, so that layers of the same name, shape and
            initializer start from the same parameters.
    """

    placements: Sequence[Placement]
    keys: Array
    train: Batch
    test: Batch
    batch_size: int
    drop_last: bool = True
    statistics: str = "global"
    shared_init: bool = False

    @property
    def arms(self) -> dict[str, Arm]:
        """All arms by name."""
        return {arm.name: arm for placement in self.placements for arm in placement.arms}

    def initial_states(self) -> States:
        """The initial state of every arm and replicate."""

        def create(placement: Placement) -> States:
            return _create(placement, self.shared_init, self.keys, self.train.images[:2])

        with ThreadPoolExecutor(1 if self._take_turns else None) as pool:
            return _merge(pool.map(create, self.placements))

    def epochs(self, states: States, numbers: range) -> Iterator[Epoch]:
        """Trains all arms and replicates epoch by epoch and evaluates each.

        Args:
            states: initial ones or those of a checkpoint; they are donated.
            numbers: which epochs to run; they count from 1.
        """
        if not numbers:
            return
        with ThreadPoolExecutor() as pool:
            compiled = pool.map(partial(self._compile, states), self.placements)
            train, *evaluations = zip(*compiled, strict=True)

        def start_all(programs: Sequence[Callable[..., T]], *inputs: Any) -> list[T]:
            results = (program(*inputs) for program in programs)
            return [jax.block_until_ready(x) if self._take_turns else x for x in results]

        for number in numbers:
            start = time.perf_counter()
            results = jax.block_until_ready(start_all(train, states, number))
            seconds = time.perf_counter() - start
            states, steps = (_merge(parts) for parts in zip(*results, strict=True))
            on_train, on_test = (_merge(start_all(each, states)) for each in evaluations)
            yield Epoch(number, states, steps, on_train, on_test, seconds)

    def _compile(self, states: States, placement: Placement) -> list[Callable[..., Any]]:
        """What trains the arms of a placement for an epoch, and evaluates them on each set."""
        mesh = placement.mesh

        def own(states: States) -> States:
            return {arm.name: states[arm.name] for arm in placement.arms}

        def evaluation(examples: Batch) -> Callable[[States], dict[str, Metrics]]:
            program = evaluate.lower(own(states), examples, mesh=mesh).compile()
            return lambda states: program(own(states), examples)

        train, test = (replicate_data(examples, mesh) for examples in (self.train, self.test))
        settings: dict[str, Any] = {"batch_size": self.batch_size, "drop_last": self.drop_last}
        settings |= {"mesh": mesh, "statistics": self.statistics}
        epoch = train_epoch.lower(own(states), self.keys, 1, train, **settings).compile()
        return [
            lambda states, number: epoch(own(states), self.keys, number, train),
            evaluation(train),
            evaluation(test),
        ]

    @property
    def _take_turns(self) -> bool:
        """Whether programs that communicate would meet on devices, and wait for each other."""
        meshes = {placement.mesh for placement in self.placements}
        return len(self.placements) > len(meshes) and any(mesh.size > 1 for mesh in meshes)


def _merge(parts: Iterable[dict[str, T]]) -> dict[str, T]:
    return {name: value for part in parts for name, value in part.items()}

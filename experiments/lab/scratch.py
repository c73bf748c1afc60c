"""Networks trained from scratch without a run, and what they predict: for sweeps and claims."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bnjax.data import Dataset
from bnjax.paired import Arm, Epoch, States, Trainer
from bnjax.training import AnyArray, Batch, TrainState, to_float
from experiments.lab import devices, metrics


def batches(dataset: Dataset) -> tuple[Batch, Batch]:
    """The training set and the test set."""
    return (
        Batch(dataset.train_images, dataset.train_labels),
        Batch(dataset.test_images, dataset.test_labels),
    )


def head(batch: Batch, count: int | None) -> Batch:
    """The first examples of a set, all of them without a count."""
    return Batch(batch.images[:count], batch.labels[:count])


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


def with_rates(state: TrainState, rates: np.ndarray) -> TrainState:
    """A state whose replicates have learning rates of their own, `[R]` float32.

    The optimizer is an `optax.inject_hyperparams`. Each state has its own copy of the rates, since
    training donates it.
    """
    opt_state = state.opt_state._replace(hyperparams={"learning_rate": jnp.array(rates)})
    return state.replace(opt_state=opt_state)


def curves(epochs: Iterable[Epoch], arms: Sequence[str]) -> metrics.Curves:
    """The metrics of these epochs, `{arm: {metric: [epochs, R]}}`."""
    return metrics.curves([line for one in epochs for line in metrics.lines_of(one, arms)], arms)


def unstack(state: TrainState) -> list[TrainState]:
    """The replicates of an arm's state, one by one."""
    return [jax.tree.map(lambda a, k=k: a[k], state) for k in range(np.size(state.step))]


@partial(jax.jit, static_argnames=("size", "train"))
def predict(
    state: TrainState, images: Array, size: int, *, train: bool, key: Array | None = None
) -> Array:
    """Classes `[n]` of the images `[N, ...]`, `size` at a time, but of those that fill no group.

    `train` predicts in training mode; `key` is for its dropout.
    """
    rngs = {} if key is None else {"dropout": key}

    def classes(group: Array) -> Array:
        x = to_float(group)
        apply = partial(state.apply_fn, mutable=["batch_stats"], rngs=rngs)
        return apply(state.variables, x, train=train)[0].argmax(axis=1)

    whole = len(images) // size * size
    return jax.lax.map(classes, images[:whole].reshape(-1, size, *images.shape[1:])).ravel()


def accuracy_of(classes: Array, labels: AnyArray) -> float:
    """Share of the classes `[n]` that are the first n labels."""
    return float((classes == labels[: len(classes)]).mean())

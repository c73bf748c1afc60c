"""Which replicates stopped being finite, and where: found after each epoch, kept in a file."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from bnjax import divergence, paired
from bnjax.errors import CheckpointError
from bnjax.paired import Epoch, States
from bnjax.parallel import processes
from bnjax.training import Batch, TrainState
from experiments.lab import metrics, rundir

FILE = "divergences.json"


def find(epoch: Epoch, known: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The replicates that stopped being finite in an epoch.

    Args:
        epoch: what it left behind.
        known: those of earlier epochs.

    Returns:
        `{arm, replicate, epoch, step, layer}` of each, counted as there, the layer still None.
        Without a step all of them were finite, and the evaluation after them was not.
    """
    seen = {(mark["arm"], mark["replicate"]) for mark in known}
    return [
        {"arm": arm, "replicate": replicate, "epoch": epoch.number, "step": step, "layer": None}
        for arm, replicate, step in _lost(epoch)
        if (arm, replicate) not in seen
    ]


def locate(
    marks: Sequence[dict[str, Any]],
    epoch: Epoch,
    keys: Array,
    train: Batch,
    test: Batch,
    batch_size: int,
    before: Callable[[], States],
    shares: int = 1,
) -> None:
    """Gives each of an epoch's divergences its layer: the first that was not finite.

    Args:
        marks: from `find`.
        epoch: what it left behind.
        keys: of the replicates, `[R]`.
        train: the training set.
        test: the test set.
        batch_size: examples per step.
        before: gives the states before the epoch.
        shares: parts of each batch that were normalized on their own.
    """
    states = processes.gather(before()) if any(mark["step"] for mark in marks) else {}
    ended = {mark["arm"] for mark in marks if not mark["step"]}
    after = {arm: processes.gather(epoch.states[arm]) for arm in ended}
    for mark in marks:
        arm, replicate, step = mark["arm"], mark["replicate"], mark["step"]
        if step:
            state, batch = divergence.replay(
                _pick(states, arm, replicate),
                train,
                paired.derive(keys[replicate], "order", epoch.number),
                step=step,
                batch_size=batch_size,
                shares=shares,
            )
        else:
            state = _pick(after, arm, replicate)
            batch = train if np.isfinite(epoch.test[arm].loss[replicate]) else test
        mark["layer"] = divergence.first_layer(state, batch, train=bool(step))


def _lost(epoch: Epoch) -> list[tuple[str, int, int | None]]:
    """Arm, replicate and step of all that is not finite."""
    found = []
    for arm, steps in epoch.steps.items():
        ends = np.stack([epoch.train[arm].loss, epoch.test[arm].loss])
        evaluated = np.isfinite(ends).all(axis=0)
        for replicate, losses in enumerate(np.asarray(steps.loss)):
            step = divergence.first_step(losses)
            if step or not evaluated[replicate]:
                found.append((arm, replicate, step))
    return found


def _pick(states: States, arm: str, replicate: int) -> TrainState:
    return jax.tree.map(lambda leaf: leaf[replicate], states[arm])


def read(path: Path) -> list[dict[str, Any]]:
    """Those of a run.

    Raises:
        CheckpointError: if they cannot be read.
    """
    file = path / FILE
    marks = rundir.parse(file, file.read_bytes()) if file.exists() else []
    if not isinstance(marks, list) or not all(map(_is_mark, marks)):
        raise CheckpointError(f"{file} is damaged: it is no list of divergences")
    return marks


def _is_mark(mark: Any) -> bool:
    return (
        isinstance(mark, dict)
        and all(type(mark.get(name)) is int for name in ("replicate", "epoch"))
        and type(mark.get("step", "")) in (int, type(None))
        and type(mark.get("layer", 0)) in (str, type(None))
        and mark.get("arm") in metrics.ARMS
    )


def truncate(path: Path, epochs: int) -> list[dict[str, Any]]:
    """Drops those of epochs after the first `epochs`; returns the others."""
    marks = read(path)
    kept = [mark for mark in marks if mark["epoch"] <= epochs]
    if kept != marks:
        write(path, kept)
    return kept


def write(path: Path, marks: Sequence[Mapping[str, Any]]) -> None:
    """Keeps those of a run."""
    rundir.write_json(path / FILE, marks)


def describe(mark: Mapping[str, Any]) -> str:
    """In words."""
    when = f"in step {mark['step']} of" if mark["step"] else "in the evaluation after"
    layer = mark["layer"] and f"; not finite from {mark['layer']} on"
    if layer and mark["layer"] == divergence.LOSS:
        layer = "; all layers were finite, the loss was not"
    arm, replicate, epoch = metrics.LABELS[mark["arm"]], mark["replicate"], mark["epoch"]
    return f"{arm}, replicate {replicate} diverged {when} epoch {epoch}{layer or ''}"

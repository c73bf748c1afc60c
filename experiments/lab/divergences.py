"""Which replicates stopped being finite, and where: found after each epoch, kept in a file.

A divergence is `{arm, replicate, epoch, step, layer}`, counted as there. Without a step all steps
were finite and the evaluation after them was not; without a layer nobody could find it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bnjax import divergence, paired
from bnjax.errors import CheckpointError
from bnjax.paired import Epoch, States, Trainer
from bnjax.parallel import processes
from bnjax.training import TrainState
from experiments.lab import rundir

FILE = "divergences.json"


def find(epoch: Epoch, known: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The replicates that stopped being finite in an epoch, their layers still None.

    Args:
        epoch: what it left behind, as NumPy can read it.
        known: divergences of earlier epochs.
    """
    seen = {(one["arm"], one["replicate"]) for one in known}
    found = []
    for arm, steps in epoch.steps.items():
        losses = np.stack([epoch.train[arm].loss, epoch.test[arm].loss])
        evaluated = np.isfinite(losses).all(axis=0)
        for replicate, of_steps in enumerate(np.asarray(steps.loss)):
            step = divergence.first_step(of_steps)
            if (step or not evaluated[replicate]) and (arm, replicate) not in seen:
                place = {"arm": arm, "replicate": replicate, "epoch": epoch.number, "step": step}
                found.append({**place, "layer": None})
    return found


def locate(
    found: Sequence[dict[str, Any]], trainer: Trainer, epoch: Epoch, before: Callable[[], States]
) -> None:
    """Gives each of an epoch's divergences its layer: the first that was not finite.

    Args:
        found: from `find`.
        trainer: what the epoch was trained with.
        epoch: what it left behind.
        before: gives the states before the epoch.
    """
    states = processes.gather(before()) if any(one["step"] for one in found) else {}
    ended = {one["arm"] for one in found if not one["step"]}
    after = {arm: processes.gather(epoch.states[arm]) for arm in ended}
    local = trainer.statistics == "local"
    for one in found:
        arm, replicate, step = one["arm"], one["replicate"], one["step"]
        if step:
            state, batch = divergence.replay(
                _pick(states[arm], replicate),
                trainer.train,
                paired.derive(trainer.keys[replicate], "order", epoch.number),
                step=step,
                batch_size=trainer.batch_size,
                shares=trainer.placements[0].mesh.shape["data"] if local else 1,
            )
        else:
            state, on_train = _pick(after[arm], replicate), epoch.train[arm].loss[replicate]
            batch = trainer.train if not np.isfinite(on_train) else trainer.test
        one["layer"] = divergence.first_layer(state, batch, train=bool(step))


def _pick(state: TrainState, replicate: int) -> TrainState:
    return jax.tree.map(lambda leaf: leaf[replicate], state)


def read(path: Path, arms: Sequence[str]) -> list[dict[str, Any]]:
    """Those of a run of these arms.

    Raises:
        CheckpointError: if they cannot be read.
    """
    file = path / FILE
    found = rundir.parse(file, file.read_bytes()) if file.exists() else []
    if not isinstance(found, list) or not all(_is_divergence(one, arms) for one in found):
        raise CheckpointError(f"{file} is damaged: it is no list of divergences")
    return found


def _is_divergence(one: Any, arms: Sequence[str]) -> bool:
    return (
        isinstance(one, dict)
        and all(type(one.get(name)) is int for name in ("replicate", "epoch"))
        and type(one.get("step", "")) in (int, type(None))
        and type(one.get("layer", 0)) in (str, type(None))
        and one.get("arm") in arms
    )


def truncate(path: Path, arms: Sequence[str], epochs: int) -> list[dict[str, Any]]:
    """Drops those of epochs after the first `epochs`; returns the others."""
    found = read(path, arms)
    kept = [one for one in found if one["epoch"] <= epochs]
    if kept != found:
        write(path, kept)
    return kept


def write(path: Path, found: Sequence[Mapping[str, Any]]) -> None:
    """Keeps those of a run."""
    rundir.write_json(path / FILE, found)


def describe(one: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """In words."""
    when = f"in step {one['step']} of" if one["step"] else "in the evaluation after"
    layer = one["layer"] and f"; not finite from {one['layer']} on"
    if layer and one["layer"] == divergence.LOSS:
        layer = "; all layers were finite, the loss was not"
    arm, replicate, epoch = labels[one["arm"]], one["replicate"], one["epoch"]
    return f"{arm}, replicate {replicate} diverged {when} epoch {epoch}{layer or ''}"

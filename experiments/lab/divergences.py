"""Which replicates stopped being finite, and where: found after each epoch, kept in a file.

A divergence is `{arm, replicate, epoch, step, layer}`, counted as there. Without a step all steps
were finite and the evaluation after them was not; without a layer nobody could find it, or looked.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bnjax import paired, training
from bnjax.checkpoint import Checkpoints
from bnjax.errors import CheckpointError
from bnjax.layer_taps import watch
from bnjax.losses import cross_entropy
from bnjax.paired import Epoch, States, Trainer
from bnjax.parallel import processes
from bnjax.training import Batch, TrainState
from experiments.lab import rundir

FILE = "divergences.json"
LOSS = "loss"
FIELDS: dict[str, set[type]] = {
    "arm": {str},
    "replicate": {int},
    "epoch": {int},
    "step": {int, NoneType},
    "layer": {str, NoneType},
}


def find(epoch: Epoch, known: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The replicates that stopped being finite in an epoch, and are not known from earlier ones.

    Metrics of the epoch are NumPy's; all layers are still None.
    """
    seen = {(one["arm"], one["replicate"]) for one in known}
    found = []
    for arm, steps in epoch.steps.items():
        ends = [epoch.train[arm].loss, epoch.test[arm].loss]
        lost = ~np.isfinite(np.column_stack([steps.loss, *ends]))  # [R, steps + 2]
        for replicate in np.flatnonzero(lost.any(axis=1)).tolist():
            if (arm, replicate) not in seen:
                first = int(lost[replicate].argmax()) + 1
                step = first if first <= steps.loss.shape[1] else None
                place = {"arm": arm, "replicate": replicate, "epoch": epoch.number, "step": step}
                found.append({**place, "layer": None})
    return found


def locate(
    found: Sequence[dict[str, Any]], trainer: Trainer, epoch: Epoch, checkpoints: Checkpoints
) -> None:
    """Gives each divergence of an epoch its layer: the first that was not finite.

    The checkpoints have the states before the epoch. No layer is looked for where devices normalize
    their shares of a batch on their own.
    """
    if trainer.statistics == "local":
        return
    done = epoch.number - 1
    before = partial(checkpoints.at, done, epoch.states) if done else trainer.initial_states
    trained = any(one["step"] for one in found)
    started: States = processes.gather(processes.run_on_all(before)) if trained else {}
    for one in found:
        arm, replicate, step = one["arm"], one["replicate"], one["step"]
        states = started[arm] if step else processes.gather(epoch.states[arm])
        state = jax.tree.map(lambda leaf, r=replicate: leaf[r], states)
        if step:
            state, batch = replay(state, trainer, replicate, epoch.number, step)
        else:
            finite = np.isfinite(epoch.train[arm].loss[replicate])
            batch = trainer.test if finite else trainer.train
        one["layer"] = first_layer(state, batch, train=bool(step))


def replay(
    state: TrainState, trainer: Trainer, replicate: int, epoch: int, step: int
) -> tuple[TrainState, Batch]:
    """Goes through an epoch of a network again: the state before a step, and the step's batch.

    Step by step, which is another program than the one that trained, and may round differently.
    """
    key = paired.derive(trainer.keys[replicate], "order", epoch)
    order = np.asarray(training.draw_order(key, len(trainer.train.labels)))
    starts = range(trainer.batch_size, len(order), trainer.batch_size)
    *earlier, last = np.split(order, starts)[:step]
    for index in earlier:
        state, _ = training.train_step(state, training.take(trainer.train, index))
    return state, training.take(trainer.train, last)


def first_layer(state: TrainState, batch: Batch, *, train: bool) -> str | None:
    """The first layer whose output is not finite where a batch goes through, as `forward` does it.

    Returns:
        The layer's path, such as `"Dense_3"`; "loss" if all layers are finite and the loss is not;
        None if everything is.

    Raises:
        ValueError: if a layer is called inside `nn.scan`, `nn.remat` or the like.
    """
    lost: list[str] = []

    def note(module: nn.Module, x: Any, y: Any) -> Any:
        if not all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(y)):
            lost.append("/".join(module.path) or "logits")
        return y

    with watch(note):
        logits, _ = training.forward(state, batch.images, train=train)
    if not jnp.isfinite(cross_entropy(logits, batch.labels).mean()):
        lost.append(LOSS)
    return lost[0] if lost else None


def read(path: Path) -> list[dict[str, Any]]:
    """Those of a run; a CheckpointError if they cannot be read."""
    file = path / FILE
    found = rundir.parse(file, file.read_bytes()) if file.exists() else []
    whole = isinstance(found, list) and all(
        isinstance(one, dict) and all(type(one.get(k, ...)) in of for k, of in FIELDS.items())
        for one in found
    )
    if not whole:
        raise CheckpointError(f"{file} is damaged: it is no list of divergences")
    return found


def truncate(path: Path, epochs: int) -> list[dict[str, Any]]:
    """Drops those of epochs after the first `epochs`; returns the others."""
    found = read(path)
    kept = [one for one in found if one["epoch"] <= epochs]
    if kept != found:
        rundir.write_json(path / FILE, kept)
    return kept


def describe(one: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """In words."""
    when = f"in step {one['step']} of" if one["step"] else "in the evaluation after"
    told = {None: "", LOSS: "; all layers were finite, the loss was not"}
    layer = told.get(one["layer"], f"; not finite from {one['layer']} on")
    arm, replicate, epoch = labels[one["arm"]], one["replicate"], one["epoch"]
    return f"{arm}, replicate {replicate} diverged {when} epoch {epoch}{layer}"

"""The metrics of a run: `metrics.jsonl`, the same as arrays, and what `summary.json` says of them.

One line per epoch, replicate and arm, appended and flushed after each epoch.
"""

import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bnjax import statistics
from bnjax.errors import CheckpointError
from bnjax.files import naming
from bnjax.paired import Epoch
from bnjax.parallel import processes
from experiments.lab import rundir

LOSSES = ("train_cost", "train_loss", "test_loss")
METRICS = ("train_cost", "train_loss", "train_accuracy", "test_loss", "test_accuracy")

Curves = dict[str, dict[str, np.ndarray]]  # {arm: {metric: [epochs, R] float64}}


def lines_of(epoch: Epoch, arms: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of an epoch, by replicate, then arm, given what NumPy can read."""
    divide = partial(np.divide, dtype=np.float64)
    values = {}
    for arm in arms:
        steps, train, test = epoch.steps[arm], epoch.train[arm], epoch.test[arm]
        values[arm] = {
            "train_cost": divide(steps.loss, steps.examples).mean(axis=1),
            "train_loss": divide(train.loss, train.examples),
            "train_accuracy": divide(train.correct, train.examples),
            "test_loss": divide(test.loss, test.examples),
            "test_accuracy": divide(test.correct, test.examples),
        }
    return [
        {
            "epoch": epoch.number,
            "arm": arm,
            "replicate": replicate,
            **{name: float(column[replicate]) for name, column in values[arm].items()},
            "seconds": epoch.seconds,
        }
        for replicate in range(len(values[arms[0]]["train_cost"]))
        for arm in arms
    ]


def append(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Appends lines to `metrics.jsonl`; what is not finite becomes `null`."""
    if not processes.is_first():
        return
    file = path / "metrics.jsonl"
    with naming(file), file.open("ab") as stream:
        stream.write(_to_jsonl(lines))
        stream.flush()
        os.fsync(stream.fileno())


def read(path: Path, arms: Sequence[str], replicates: int) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` but for a torn last one; none if it does not exist yet.

    They must be those of epochs from 1, each of every replicate and arm.
    """
    file = path / "metrics.jsonl"
    content = file.read_bytes() if file.exists() else b""
    lines = [rundir.parse(file, line) for line in content.split(b"\n")[:-1]]
    places = itertools.product(range(1, len(lines) + 1), range(replicates), arms)
    for number, (line, (epoch, replicate, arm)) in enumerate(zip(lines, places, strict=False), 1):
        if not _is_line(line, {"epoch": epoch, "replicate": replicate, "arm": arm}):
            raise CheckpointError(
                f"{file} is damaged: line {number} does not hold the metrics of epoch {epoch}, "
                f"replicate {replicate}, arm {arm}"
            )
    return lines


def _is_line(line: Any, place: Mapping[str, Any]) -> bool:
    return (
        isinstance(line, dict)
        # In Python 1 is True and 1.0 as well.
        and all(line.get(k) == v and type(line[k]) is type(v) for k, v in place.items())
        and all(type(line.get(k, "")) in (float, type(None)) for k in (*METRICS, "seconds"))
    )


def write(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replaces `metrics.jsonl`, as by the lines of fewer epochs."""
    rundir.write_bytes(path / "metrics.jsonl", _to_jsonl(lines))


def _to_jsonl(lines: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(
        json.dumps(rundir.null_for_nan(x), allow_nan=False).encode() + b"\n" for x in lines
    )


def curves(lines: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> Curves:
    """The metrics of whole epochs as arrays: `{arm: {metric: [epochs, R] float64}}`.

    From the epoch on in which a loss of a replicate is not finite, all its metrics are NaN: its
    accuracy would be chance.
    """
    replicates = 1 + max((line["replicate"] for line in lines), default=0)
    whole = len(lines) // (replicates * len(arms)) * replicates * len(arms)
    values = np.array([[line[name] for name in METRICS] for line in lines[:whole]], np.float64)
    table = values.reshape(-1, replicates, len(arms), len(METRICS))
    losses = table[..., [METRICS.index(name) for name in LOSSES]]
    finite = np.logical_and.accumulate(np.isfinite(losses).all(axis=-1, keepdims=True), axis=0)
    table = np.where(finite, table, np.nan)
    return {
        arm: {name: table[:, :, k, m] for m, name in enumerate(METRICS)}
        for k, arm in enumerate(arms)
    }


def replicate_to_look_into(by_arm: Curves) -> int | None:
    """The replicate to look into, the first that most networks survived; None if none did any."""
    finite = np.array([np.isfinite(of_arm["train_cost"][-1]) for of_arm in by_arm.values()])
    return int(finite.sum(axis=0).argmax()) if finite.any() else None


def summarize(by_arm: Curves, reference: str) -> dict[str, Any]:
    """The content of `summary.json`: final metrics of each arm, and arm minus reference."""
    epochs, replicates = by_arm[reference]["train_cost"].shape
    final = {arm: {m: values[-1] for m, values in of.items()} for arm, of in by_arm.items()}
    return {
        "epochs": epochs,
        "replicates": replicates,
        "reference": reference,
        "arms": {
            arm: {metric: statistics.summarize(values)._asdict() for metric, values in all_.items()}
            for arm, all_ in final.items()
        },
        "differences": {
            arm: {metric: difference(metric, all_, final[reference]) for metric in METRICS}
            for arm, all_ in final.items()
            if arm != reference
        },
    }


def difference(
    metric: str, first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """First minus second by a metric, pair by pair; a loss is better where it is lower."""
    return statistics.paired_difference(
        first[metric], second[metric], lower_is_better=not metric.endswith("accuracy")
    )._asdict()

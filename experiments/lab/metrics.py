"""The metrics of a run: `metrics.jsonl`, the same as arrays, and what `summary.json` says of them.

One line per epoch, arm and replicate, appended and flushed after each epoch.
"""

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnjax import statistics
from bnjax.errors import CheckpointError
from experiments.lab import rundir

ARMS = ("bn", "no_bn")
LABELS = {"bn": "with BN", "no_bn": "without BN"}
LOSSES = ("train_cost", "train_loss", "test_loss")
METRICS = ("train_cost", "train_loss", "train_accuracy", "test_loss", "test_accuracy")


def append(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Appends lines to `metrics.jsonl`; what is not finite becomes `null`."""
    file = path / "metrics.jsonl"
    with rundir.naming(file), file.open("ab") as stream:
        stream.write(_to_jsonl(lines))
        stream.flush()
        os.fsync(stream.fileno())


def read(path: Path, replicates: int | None = None) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` but for a torn last one; none if it does not exist yet.

    Args:
        path: run directory.
        replicates: how many there must be; by default as many as the first epoch has.

    Raises:
        CheckpointError: if they are not those of epochs from 1, each of every replicate and arm.
    """
    file = path / "metrics.jsonl"
    content = file.read_bytes() if file.exists() else b""
    lines = [rundir.parse(file, line) for line in content.split(b"\n")[:-1]]
    places = _places(replicates or sum(map(_starts_replicate, lines)) or 1)
    for number, (line, place) in enumerate(zip(lines, places, strict=False), 1):
        if not _is_line(line, place):
            raise CheckpointError(
                f"{file} is damaged: line {number} does not hold the metrics of epoch {place[0]}, "
                f"replicate {place[1]}, arm {place[2]}"
            )
    return lines


def _places(replicates: int) -> Iterator[tuple[int, int, str]]:
    return ((e, k, arm) for e in itertools.count(1) for k in range(replicates) for arm in ARMS)


def _starts_replicate(line: Any) -> bool:
    return isinstance(line, dict) and line.get("epoch") == 1 and line.get("arm") == ARMS[0]


def _is_line(line: Any, place: tuple[int, int, str]) -> bool:
    if not isinstance(line, dict):
        return False
    found = [line.get(name) for name in ("epoch", "replicate", "arm")]
    numbers = [line.get(name, "") for name in (*METRICS, "seconds")]
    return (
        found == list(place)
        and list(map(type, found)) == [int, int, str]
        and all(number is None or type(number) is float for number in numbers)
    )


def truncate(path: Path, epochs: int) -> None:
    """Drops the lines of epochs after the first `epochs`, and a torn last line."""
    kept = [line for line in read(path) if line["epoch"] <= epochs]
    rundir.write_bytes(path / "metrics.jsonl", _to_jsonl(kept))


def _to_jsonl(lines: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(
        json.dumps(rundir.null_for_nan(x), allow_nan=False).encode() + b"\n" for x in lines
    )


def curves(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """The metrics as arrays: `{arm: {metric: [epochs, replicates] float64}}`.

    From the epoch on in which a loss of a replicate is not finite, all its metrics are NaN: its
    accuracy would be chance.
    """
    lines = list(lines)
    epochs = max(line["epoch"] for line in lines)
    replicates = 1 + max(line["replicate"] for line in lines)
    result = {
        arm: {metric: np.full((epochs, replicates), np.nan) for metric in METRICS} for arm in ARMS
    }
    for line in lines:
        place = line["epoch"] - 1, line["replicate"]
        for metric, values in result[line["arm"]].items():
            values[place] = line[metric]
    for metrics in result.values():
        finite = np.all([np.isfinite(metrics[name]) for name in LOSSES], axis=0)
        for values in metrics.values():
            values[~np.logical_and.accumulate(finite, axis=0)] = np.nan
    return result


def finite_to_the_end(lines: Iterable[Mapping[str, Any]]) -> int | None:
    """The first replicate that diverged in neither network, to be looked into; None if all did."""
    by_arm = curves(lines)
    finite = np.all([np.isfinite(by_arm[arm][METRICS[0]][-1]) for arm in ARMS], axis=0)
    return int(finite.argmax()) if finite.any() else None


def write_summary(
    path: Path, lines: Iterable[Mapping[str, Any]], divergences: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Writes `summary.json`, the last file of a run, and returns its content."""
    summary = {**summarize(lines), "divergences": divergences}
    rundir.write_json(path / "summary.json", summary)
    return summary


def summarize(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of `summary.json`: final metrics per arm, and BN minus no BN pair by pair."""
    by_arm = curves(lines)
    epochs, replicates = by_arm[ARMS[0]][METRICS[0]].shape
    final = {
        arm: {metric: values[-1] for metric, values in metrics.items()}
        for arm, metrics in by_arm.items()
    }
    first, second = (final[arm] for arm in ARMS)
    return {
        "epochs": epochs,
        "replicates": replicates,
        "arms": {
            arm: {metric: statistics.summarize(values)._asdict() for metric, values in all_.items()}
            for arm, all_ in final.items()
        },
        "paired_differences": {
            metric: statistics.paired_difference(
                first[metric], second[metric], lower_is_better=not metric.endswith("accuracy")
            )._asdict()
            for metric in METRICS
        },
    }

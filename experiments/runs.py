"""Run directories: what a run leaves behind, written so that a file is there whole or not at all.

config.json      the experiment, how it was executed, versions, devices, the dataset's checksum
metrics.jsonl    one line per epoch, arm and replicate, flushed after each epoch
summary.json     final metrics per arm, paired differences
probes/          what the diagnostics saw after each epoch
checkpoints/     the state, to go on from
curves.png ...   pictures, and report.html
"""

import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bnjax import statistics
from bnjax.errors import CheckpointError

ARMS = ("bn", "no_bn")
SECTIONS = ("experiment", "execution", "dataset")
METRICS = ("train_cost", "train_loss", "train_accuracy", "test_loss", "test_accuracy")


def default_path(preset: str, dataset: str) -> Path:
    """`runs/<preset>-<dataset>-<time>`, with a number behind it where that is taken."""
    stem = f"{preset}-{dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (stem, *(f"{stem}-{number}" for number in range(2, 1000)))
    return next(path for name in names if not (path := Path("runs") / name).exists())


def check_free(path: Path) -> None:
    """Refuses a path that something else already occupies.

    Raises:
        ValueError: if it is a file, or a directory that is not empty or cannot be read.
    """
    try:
        if path.is_dir() and any(path.iterdir()):
            raise ValueError(f"{path} is not empty: choose another directory for --out")
    except OSError as error:
        raise ValueError(f"{path} cannot be used: {error.strerror}") from error
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: choose a directory for --out")


def create(path: Path, config: Mapping[str, Any]) -> None:
    """Makes the run directory appear with `config.json` inside.

    Raises:
        ValueError: if it cannot be made.
    """
    check_free(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        write_json(partial / "config.json", config)
        partial.rename(path)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(f"{path} cannot be created: {error.strerror}") from error


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of a saved run.

    Raises:
        ValueError: if there is none that can be read.
    """
    try:
        config = json.loads((path / "config.json").read_text())
    except OSError as error:
        raise ValueError(
            f"{path} is not a run directory: config.json cannot be read ({error.strerror})"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'} is damaged: {error}") from error
    sections = [config.get(name) for name in SECTIONS] if isinstance(config, dict) else [None]
    if not all(isinstance(section, dict) for section in sections):
        raise ValueError(f"{path / 'config.json'} is damaged: it lacks {', '.join(SECTIONS)}")
    if not all(isinstance(config["dataset"].get(k), str) for k in ("name", "requested", "sha256")):
        raise ValueError(f"{path / 'config.json'} is damaged: it does not describe its dataset")
    return config


def is_finished(path: Path, epochs: int) -> bool:
    """Whether a run has written its summary, the last of its files, after that many epochs."""
    try:
        return json.loads((path / "summary.json").read_text())["epochs"] == epochs
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON under a temporary name and renames it."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an `.npz` file under a temporary name and renames it; makes its directory."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    partial.replace(path)


def provenance() -> dict[str, Any]:
    """What produced the numbers: versions, and the git commit where there is one."""
    packages = ("bnjax", "jax", "jaxlib", "flax", "optax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() or None


def append_metrics(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Appends lines to `metrics.jsonl`; what is not finite becomes `null`."""
    text = "".join(json.dumps(null_for_nan(line), allow_nan=False) + "\n" for line in lines)
    with (path / "metrics.jsonl").open("a") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, none if it does not exist yet."""
    file = path / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def truncate_metrics(path: Path, epochs: int) -> None:
    """Drops the lines of epochs after the first `epochs`, and a torn last line."""
    file = path / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    try:
        kept = [x for x in lines if x.endswith("\n") and json.loads(x)["epoch"] <= epochs]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    write_bytes(file, "".join(kept).encode())


def null_for_nan(value: Any) -> Any:
    """JSON's values with `None` in place of floats that are not finite, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: null_for_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [null_for_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def nan_for_null(value: Any) -> Any:
    """JSON's values with NaN in place of `None`."""
    if isinstance(value, dict):
        return {key: nan_for_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [nan_for_null(item) for item in value]
    return math.nan if value is None else value


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def curves(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """The metrics as arrays: `{arm: {metric: [epochs, replicates] float64}}`.

    Where a replicate has diverged, all its metrics are NaN: its accuracy would be chance.
    """
    lines = list(lines)
    epochs = max(line["epoch"] for line in lines)
    replicates = 1 + max(line["replicate"] for line in lines)
    result = {
        arm: {metric: np.full((epochs, replicates), np.nan) for metric in METRICS} for arm in ARMS
    }
    for line in lines:
        if all(_is_finite(line[metric]) for metric in ("train_cost", "test_loss")):
            for metric in METRICS:
                place = line["epoch"] - 1, line["replicate"]
                result[line["arm"]][metric][place] = line[metric]
    return result


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

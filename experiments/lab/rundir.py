"""Run directories: what a run leaves behind, written so that a file is there whole or not at all.

config.json      the experiment, how it was executed, versions, devices, the dataset's checksum
metrics.jsonl    one line per epoch, arm and replicate, flushed after each epoch
divergences.json where replicates stopped being finite, if any did
summary.json     final metrics per arm, paired differences
probes/          what the diagnostics saw after each epoch
checkpoints/     the state, to go on from
curves.png ...   pictures, and report.html
"""

import contextlib
import importlib.metadata
import io
import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from bnjax import files
from bnjax.errors import CheckpointError
from bnjax.parallel import processes
from bnjax.version import __version__

SECTIONS = dict.fromkeys(("experiment", "execution", "dataset", "versions"), dict)
DATASET = dict.fromkeys(("name", "requested", "sha256"), str)


class ReportWarning(UserWarning):
    """A part of a report that is missing."""


def default_path(preset: str, dataset: str) -> Path:
    """`runs/<preset>-<dataset>-<time>`, with a number behind it where that is taken."""
    stem = f"{preset}-{dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (stem, *(f"{stem}-{number}" for number in range(2, 1000)))
    return next(path for name in names if not (path := Path("runs") / name).exists())


def check_free(path: Path) -> None:
    """Refuses what is there already, but for an empty directory."""
    try:
        if path.is_dir() and any(path.iterdir()):
            raise ValueError(f"{path} is not empty: choose another directory for --out")
    except OSError as error:
        raise ValueError(f"{path} cannot be used: {error.strerror}") from error
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: choose a directory for --out")
    if path.resolve() == Path.cwd():
        raise ValueError(f"{path} is where you are: choose another directory for --out")


def create(path: Path, config: Mapping[str, Any]) -> None:
    """Makes the run directory appear with `config.json` inside."""
    check_free(path)
    path = path.resolve()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        write_json(partial / "config.json", config)
        partial.rename(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be created: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of a saved run."""
    file = path / "config.json"
    try:
        config = read_object(file, SECTIONS)
    except OSError as error:
        if not path.exists():
            raise CheckpointError(f"there is no directory {path}") from error
        raise CheckpointError(
            f"{path} is not a run directory: config.json cannot be read ({error.strerror})"
        ) from error
    _check_object(file, config["dataset"], DATASET)
    _check_object(file, {"resumed": [], **config}, {"resumed": list})
    if (saved_by := str(config["versions"].get("bnjax"))).startswith("0.1."):
        raise CheckpointError(
            f"{path} was saved by bnjax {saved_by}, which this version cannot read: use that "
            "version, or run it again"
        )
    return config


def parse(file: Path, content: bytes) -> Any:
    """What JSON says that was read from a file."""
    try:
        return json.loads(content, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def read_object(file: Path, types: Mapping[str, type]) -> dict[str, Any]:
    """An object that a run has written, with values of these types."""
    content = parse(file, file.read_bytes())
    _check_object(file, content, types)
    return content


def _check_object(file: Path, content: Any, types: Mapping[str, type]) -> None:
    given = content if isinstance(content, dict) else {}
    lacking = [name for name, kind in types.items() if not isinstance(given.get(name), kind)]
    if lacking:
        raise CheckpointError(f"{file} is damaged: it lacks {', '.join(lacking)}")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number that JSON has")


def expand(path: Path) -> Path:
    """A path that a user typed, with `~` replaced."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps a run directory to this process, which has its file `.lock` meanwhile."""
    file = path.resolve(strict=True) / ".lock"  # FileLock would make a directory that is gone
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0.2)  # long enough to see that the owner of a soft lock is gone
    except Timeout as error:  # a soft lock stays where its owner ended on another machine
        raise CheckpointError(
            f"{path} is in use by another process: wait for its end, or delete {file} if there is "
            "no such process"
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the directory may be gone, and Windows deletes later
            file.unlink()  # while it is held: a process that waits for it sees that it is gone
        lock.release()


def is_finished(path: Path, epochs: int) -> bool:
    """Whether a run has written its summary, the last of its files, after that many epochs."""
    try:
        return read_object(path / "summary.json", {"epochs": int})["epochs"] == epochs
    except (OSError, CheckpointError):
        return False


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file by `bnjax.files`; of several processes the first does, here and below."""
    if processes.is_first():
        files.write(path, content)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an `.npz` file."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_bytes(path, buffer.getvalue())


def provenance() -> dict[str, Any]:
    """What produced the numbers: versions, and the git commit where there is one."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    own = {"python": platform.python_version(), "bnjax": __version__}
    return {"versions": {**own, **versions}, "git_commit": _git_commit()}


def _git_commit() -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD"]
    with contextlib.suppress(OSError):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.stdout.strip() or None
    return None


def null_for_nan(value: Any) -> Any:
    """JSON's values with `None` in place of floats that are not finite, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: null_for_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [null_for_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

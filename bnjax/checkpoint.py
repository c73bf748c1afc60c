"""Saving and restoring the state of a run, one standard file after each epoch.

`epoch-007.safetensors` holds every array of the state under its path, as
`bn/params/Dense_0/kernel`, with the replicates as first axis. Its metadata are the number of
epochs, the settings, and a SHA-256 over these and names, dtypes, shapes and bytes of all arrays.
"""

import hashlib
import json
import math
import re
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from bnjax import files
from bnjax.errors import CheckpointError, CheckpointWarning, DamagedCheckpointError, shorten
from bnjax.parallel import processes
from bnjax.parallel.mesh import place
from bnjax.training import by_path

KEEP = 2


def file_of(directory: Path, epochs: int) -> Path:
    """The checkpoint after `epochs` epochs, among those in `directory`."""
    return directory / f"epoch-{epochs:03}.safetensors"


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a checkpoint by their names, and its metadata: `epochs` and `settings`.

    Raises:
        DamagedCheckpointError: if it is not as it was written.
        OSError: if it cannot be read.
    """
    try:
        with path.open("rb"), safetensors.safe_open(path, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (safetensors.SafetensorError, AttributeError) as error:  # NumPy lacks some of its types
        raise DamagedCheckpointError(f"{path}: it is damaged ({shorten(error)})") from error
    if metadata.pop("sha256", None) != _checksum(arrays, metadata):
        raise DamagedCheckpointError(f"{path}: it is damaged (its checksum is wrong)")
    return arrays, metadata


class Checkpoints:
    """The checkpoints of a run, of which the last two are kept.

    Among processes the first writes, and where that fails it fails in all.
    """

    def __init__(self, directory: Path, settings: str = "") -> None:
        """Those in `directory`, whose parent must exist; ones of other `settings` are refused."""
        self._directory = directory.absolute()
        self._settings = settings

    def save(self, epochs: int, states: Any) -> None:
        """Saves `states`, a pytree of arrays, as they are after `epochs` epochs."""
        whole = by_path(processes.gather(states))
        arrays = {name: np.asarray(leaf, order="C") for name, leaf in whole.items()}
        metadata = {"epochs": str(epochs), "settings": self._settings}
        checksum = _checksum(arrays, metadata)
        content = safetensors.numpy.save(arrays, {**metadata, "sha256": checksum})
        path = file_of(self._directory, epochs)
        processes.run_on_all(lambda: _write(path, content) if processes.is_first() else None)

    def restore(self, states: Any, *, at_most: float = math.inf) -> tuple[int, Any]:
        """The number of epochs of the last whole checkpoint and its states; `(0, states)` if none.

        A checkpoint that is not as it was written is set aside with a `CheckpointWarning`, and the
        one before takes its place.

        Args:
            states: what a fresh run starts from; gives structure, shapes, dtypes and devices.
            at_most: checkpoints of more epochs are set aside too.

        Raises:
            CheckpointError, OSError: as `at`.
        """
        for epochs in reversed(processes.allgather_object(_epochs(self._directory))[0]):
            path, problem = file_of(self._directory, epochs), None
            if epochs > at_most:
                problem = f"{path}: only {at_most} epochs are recorded"
            else:
                try:
                    found = self.at(epochs, states)
                except DamagedCheckpointError as error:
                    problem = str(error)
            problems = list(filter(None, processes.allgather_object(problem)))
            if not problems:
                return epochs, found
            if processes.is_first():
                aside = path.rename(path.with_name(f"damaged-{time.time_ns()}-{path.name}"))
                told = f"{problems[0]}; an earlier state takes its place, it is now {aside.name}"
                warnings.warn(told, CheckpointWarning, stacklevel=2)
        return 0, states

    def at(self, epochs: int, states: Any) -> Any:
        """The states after `epochs` epochs, of a checkpoint that is still kept.

        Raises as `load`, and a CheckpointError if it holds states of another structure or other
        settings.
        """
        path = file_of(self._directory, epochs)
        arrays, metadata = load(path)
        if metadata["epochs"] != str(epochs):
            told = f"it holds the state after epoch {metadata['epochs']}"
            raise DamagedCheckpointError(f"{path}: it is damaged ({told})")
        wanted = by_path(states)
        if metadata["settings"] != self._settings or _describe(arrays) != _describe(wanted):
            raise CheckpointError(
                f"{path}: of other settings or of another version of the networks; go on with "
                "those that wrote it, or start a new run"
            )
        placed = [place(arrays[name], leaf.sharding) for name, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(states), placed)


def _describe(arrays: Mapping[str, Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    return sorted((name, array.dtype.name, array.shape) for name, array in arrays.items())


def _checksum(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    told = json.dumps([sorted(metadata.items()), _describe(arrays)])
    digest = hashlib.sha256(told.encode())
    for name in sorted(arrays):
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _epochs(directory: Path) -> list[int]:
    """After how many epochs there are checkpoints."""
    names = [file.name for file in directory.iterdir()] if directory.is_dir() else []
    found = (re.fullmatch(r"epoch-(\d{3,})\.safetensors", name) for name in names)
    return sorted(int(one[1]) for one in found if one)


def _write(path: Path, content: bytes) -> None:
    """Makes the file appear, and removes all but the last few."""
    files.write(path, content, sync=True)
    for old in _epochs(path.parent)[:-KEEP]:
        file_of(path.parent, old).unlink()

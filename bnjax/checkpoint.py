"""Saving and restoring the state of a run with orbax.

A checkpoint is one vector of bytes: a checksum, a fingerprint of the structure, and all leaves end
to end. Orbax's time goes by the number of arrays, and the checksum covers every byte of them.
"""

import errno
import math
import os
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from bnjax.errors import CheckpointError, CheckpointWarning, DamagedCheckpointError

KEEP = 2
HEADER = 8


class Checkpoints:
    """The checkpoints of a run, one per epoch, of which the last few are kept.

    Saving goes on in the background; leaving the `with` block waits for it.
    """

    def __init__(self, directory: Path) -> None:
        """Looks into `directory`, which need not exist."""
        self._directory = directory.absolute()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if "_manager" in vars(self):
            with self._writing():
                self._manager.close()

    def save(self, epochs: int, states: Any) -> None:
        """Saves `states`, a pytree of arrays, as they are after `epochs` epochs.

        Raises:
            OSError: if this checkpoint, or the one before, cannot be written.
        """
        import orbax.checkpoint as ocp

        with self._writing():
            self._manager.save(epochs, args=ocp.args.StandardSave({"state": _pack(states)}))

    def restore(self, states: Any, *, at_most: float = math.inf) -> tuple[int, Any]:
        """The number of epochs of the last whole checkpoint and its states; `(0, states)` if none.

        A checkpoint that cannot be read, or not as it was written, is removed with a
        `CheckpointWarning`, and the one before takes its place.

        Args:
            states: what a fresh run starts from; gives structure, shapes, dtypes and devices.
            at_most: checkpoints of more epochs are removed too.

        Raises:
            CheckpointError: if the checkpoint holds states of another structure.
        """
        if not self._directory.is_dir():
            return 0, states
        for epochs in sorted(self._manager.all_steps(), reverse=True):
            path = self._directory / str(epochs)
            try:
                if epochs > at_most:
                    raise DamagedCheckpointError(f"{path}: only {at_most} epochs are recorded")
                return epochs, self._unpack(self._read(epochs), states)
            except DamagedCheckpointError as error:
                warnings.warn(f"{error}; an earlier state takes its place", CheckpointWarning, 2)
                self._manager.delete(epochs)
        return 0, states

    def at(self, epochs: int, states: Any) -> Any:
        """The states after `epochs` epochs, of a checkpoint that is still kept.

        Raises:
            CheckpointError: if it cannot be read.
        """
        with self._writing():
            self._manager.wait_until_finished()
        return self._unpack(self._read(epochs), states)

    def _read(self, epochs: int) -> np.ndarray:
        import orbax.checkpoint as ocp

        path = self._directory / str(epochs)
        try:
            saved = self._manager.restore(epochs, args=ocp.args.StandardRestore())
        except Exception as error:  # orbax and its file formats raise whatever they like
            raise DamagedCheckpointError(f"{path}: damaged ({_shorten(error)})") from error
        if set(saved) != {"state"}:
            raise CheckpointError(f"{path}: written by another version of bnjax; go on with it")
        packed = np.asarray(saved["state"])
        if len(packed) < HEADER or packed[:4].view(np.uint32) != _checksum(packed):
            raise DamagedCheckpointError(f"{path}: damaged (its checksum is wrong)")
        return packed

    def _unpack(self, packed: np.ndarray, states: Any) -> Any:
        if packed[:HEADER].view(np.uint32)[1] != _fingerprint(states):
            raise CheckpointError(
                f"{self._directory}: the checkpoint holds other variables than this version of the "
                "networks; go on with the version that wrote it, or start a new run"
            )
        place = HEADER

        def take(leaf: jax.Array) -> jax.Array:
            nonlocal place
            content = packed[place : place + leaf.nbytes].tobytes()
            place += leaf.nbytes
            values = np.frombuffer(content, leaf.dtype).reshape(leaf.shape)
            return jax.device_put(values, leaf.sharding)

        return jax.tree.map(take, states)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # as above; the system's own code stands in tensorstore's text
            code = re.search(r"os_error_code='(\d+)'", str(error))
            number = int(code[1]) if code else getattr(error, "errno", None) or errno.EIO
            reason = os.strerror(number) if code else _shorten(error)
            raise OSError(number, reason, str(self._directory)) from error

    @cached_property
    def _manager(self) -> Any:
        import orbax.checkpoint as ocp  # a third of a second, after the first epoch's line

        options = ocp.CheckpointManagerOptions(max_to_keep=KEEP)
        return ocp.CheckpointManager(self._directory, options=options)


def _pack(states: Any) -> np.ndarray:
    leaves = [np.asarray(leaf).reshape(-1).view(np.uint8) for leaf in jax.tree.leaves(states)]
    packed = np.concatenate([np.zeros(HEADER, np.uint8), *leaves])
    header = packed[:HEADER].view(np.uint32)
    header[1] = _fingerprint(states)
    header[0] = _checksum(packed)
    return packed


def _checksum(packed: np.ndarray) -> int:
    return zlib.crc32(packed[4:].data)


def _fingerprint(states: Any) -> int:
    """A checksum of the names, shapes and dtypes of all leaves."""
    leaves, _ = jax.tree.flatten_with_path(states)
    told = [(jax.tree_util.keystr(path), leaf.shape, leaf.dtype.name) for path, leaf in leaves]
    return zlib.crc32(repr(told).encode())


def _shorten(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

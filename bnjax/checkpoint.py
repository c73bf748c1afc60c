"""Saving and restoring the state of a run with orbax.

A checkpoint is one vector of bytes: a checksum, a fingerprint of the structure, and all leaves end
to end. Orbax's time goes by the number of arrays, and the checksum covers every byte of them.
"""

import errno
import math
import os
import re
import tempfile
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

from bnjax.errors import CheckpointError, CheckpointWarning, DamagedCheckpointError, shorten
from bnjax.parallel import processes
from bnjax.parallel.mesh import place

KEEP = 2
HEADER = 8


class Checkpoints:
    """The checkpoints of a run, one per epoch, of which the last few are kept.

    Saving goes on in the background, and leaving the `with` block waits for it; among processes
    each writes its part, and saving ends before the next epoch begins.
    """

    def __init__(self, directory: Path, settings: str = "") -> None:
        """Looks into `directory`, which need not exist.

        Args:
            directory: of the checkpoints; its parent must exist when one is saved.
            settings: what decides the numbers of the run; states of others are refused.
        """
        self._directory = directory.absolute()
        self._settings = settings
        self._latest: tuple[int, np.ndarray] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if "_manager" in vars(self) and (kind is None or processes.count() == 1):
            with self._writing():
                self._manager.close()

    def save(self, epochs: int, states: Any) -> None:
        """Saves `states`, a pytree of arrays, as they are after `epochs` epochs.

        Raises:
            OSError: if this checkpoint, or the one before, cannot be written.
        """
        import orbax.checkpoint as ocp

        packed = self._pack(epochs, states)
        self._latest = epochs, packed
        with self._writing():
            if processes.is_first():
                self._directory.mkdir(exist_ok=True)  # orbax would make lost ones again
            processes.wait("a directory for checkpoints")
            self._manager.save(
                epochs, args=ocp.args.StandardSave({"state": processes.share(packed)})
            )

    def restore(self, states: Any, *, at_most: float = math.inf) -> tuple[int, Any]:
        """The number of epochs of the last whole checkpoint and its states; `(0, states)` if none.

        A checkpoint that is not as it was written is set aside with a `CheckpointWarning`, and the
        one before takes its place.

        Args:
            states: what a fresh run starts from; gives structure, shapes, dtypes and devices.
            at_most: checkpoints of more epochs are set aside too.

        Raises:
            CheckpointError: if the checkpoint holds states of another structure or other settings.
            OSError: if the system does not let it be read.
        """
        if not self._directory.is_dir():
            return 0, states
        for epochs in sorted(self._manager.all_steps(), reverse=True):
            if epochs > at_most:
                self._set_aside(epochs, f"only {at_most} epochs are recorded")
                continue
            try:
                return epochs, self.at(epochs, states)
            except DamagedCheckpointError as error:
                self._set_aside(epochs, str(error))
        return 0, states

    def at(self, epochs: int, states: Any) -> Any:
        """The states after `epochs` epochs, of a checkpoint that is still kept.

        Those that were saved or restored last are not read from the disk again.

        Raises:
            DamagedCheckpointError: if it is not as it was written.
            CheckpointError: if it holds states of another structure or other settings.
            OSError: if the system does not let it be read.
        """
        if self._latest is None or self._latest[0] != epochs:
            with self._writing():
                self._manager.wait_until_finished()
            self._latest = epochs, self._read(epochs)
        packed = self._latest[1]
        if packed[:HEADER].view(np.uint32)[1] != self._fingerprint(states):
            raise CheckpointError(
                f"{self._directory / str(epochs)}: of other settings or of another version of the "
                "networks; go on with those that wrote it, or start a new run"
            )
        start = HEADER

        def take(leaf: jax.Array) -> jax.Array:
            nonlocal start
            content = packed[start : start + leaf.nbytes].tobytes()
            start += leaf.nbytes
            values = np.frombuffer(content, leaf.dtype).reshape(leaf.shape)
            return place(values, leaf.sharding)

        return jax.tree.map(take, states)

    def _read(self, epochs: int) -> np.ndarray:
        import orbax.checkpoint as ocp

        path = self._directory / str(epochs)
        try:
            kind = self._manager.item_metadata(epochs).tree
            whole = ocp.args.StandardRestore({"state": np.zeros(0, np.uint8)})
            saved = self._manager.restore(epochs, args=whole) if _is_vector(kind) else None
        except MemoryError:
            raise
        except Exception as error:  # orbax and its file formats raise whatever they like
            if processes.is_lost(error):
                raise
            code = _system_code(error)
            if code not in (None, errno.ENOENT):
                raise OSError(code, os.strerror(code), str(path)) from error
            raise DamagedCheckpointError(f"it is damaged ({shorten(error)})") from error
        if saved is None:
            raise CheckpointError(f"{path}: written by another version of bnjax; go on with it")
        packed = saved["state"]
        if len(packed) < HEADER or packed[:4].view(np.uint32) != _checksum(epochs, packed):
            raise DamagedCheckpointError("it is damaged (its checksum is wrong)")
        return packed

    def _set_aside(self, epochs: int, problem: str) -> None:
        path = self._directory / str(epochs)
        aside = None
        processes.wait(f"{path} was read")
        if processes.is_first():
            aside = tempfile.mkdtemp(prefix=f"damaged-{epochs}-", dir=self._directory)
            path.rename(aside)
        aside = processes.tell_all(aside)[0]
        self._manager.reload()
        warnings.warn(
            f"{path}: {problem}; an earlier state takes its place, it is now {Path(aside).name}",
            CheckpointWarning,
            stacklevel=3,
        )

    def _pack(self, epochs: int, states: Any) -> np.ndarray:
        leaves = [
            leaf.reshape(-1).view(np.uint8) for leaf in jax.tree.leaves(processes.gather(states))
        ]
        size = HEADER + sum(map(len, leaves))
        spare = -size % processes.count()
        packed = np.concatenate([np.zeros(HEADER, np.uint8), *leaves, np.zeros(spare, np.uint8)])
        header = packed[:HEADER].view(np.uint32)
        header[1] = self._fingerprint(states)
        header[0] = _checksum(epochs, packed)
        return packed

    def _fingerprint(self, states: Any) -> int:
        """A checksum of the settings and of the names, shapes and dtypes of all leaves."""
        leaves, _ = jax.tree.flatten_with_path(states)
        told = [(jax.tree_util.keystr(path), leaf.shape, leaf.dtype.name) for path, leaf in leaves]
        return zlib.crc32(repr((self._settings, told)).encode())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # as above
            if processes.is_lost(error):
                raise
            code = _system_code(error)
            reason = os.strerror(code) if code else shorten(error)
            raise OSError(code or errno.EIO, reason, str(self._directory)) from error

    @cached_property
    def _manager(self) -> Any:
        import orbax.checkpoint as ocp  # a third of a second, after the first epoch's line

        # Made in the background, a directory that cannot be made would keep the program waiting.
        at_once = ocp.AsyncOptions(create_directories_asynchronously=False)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEEP,
            async_options=at_once,
            # Among processes, one may fail while others wait: nothing is left in the background.
            enable_async_checkpointing=processes.count() == 1,
        )
        handler = ocp.StandardCheckpointHandler()
        return ocp.CheckpointManager(self._directory, options=options, item_handlers=handler)


def _is_vector(kind: Any) -> bool:
    """Whether orbax says that there is one vector of bytes."""
    if not isinstance(kind, dict) or list(kind) != ["state"]:
        return False
    one = kind["state"]
    return getattr(one, "dtype", None) == np.uint8 and len(one.shape) == 1


def _checksum(epochs: int, packed: np.ndarray) -> int:
    return zlib.crc32(packed[4:].data, epochs)


def _system_code(error: Exception) -> int | None:
    """The system's own number of an error, which tensorstore has in its text."""
    told = re.search(r"os_error_code='(\d+)'", str(error))
    return int(told[1]) if told else getattr(error, "errno", None)

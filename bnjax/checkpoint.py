"""Saving and restoring the state of a run with orbax."""

import zlib
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from bnjax.errors import CheckpointError

KEEP = 2


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
            self._manager.close()

    def save(self, epochs: int, states: Any) -> None:
        """Saves `states`, a pytree of arrays, as they are after `epochs` epochs."""
        import orbax.checkpoint as ocp

        self._manager.save(epochs, args=ocp.args.StandardSave(_pack(states)))

    def restore(self, states: Any) -> tuple[int, Any]:
        """The number of epochs of the last checkpoint and its states; `(0, states)` without one.

        Args:
            states: what a fresh run starts from; gives structure, shapes, dtypes and devices.

        Raises:
            CheckpointError: if the checkpoint holds states of another structure.
        """
        if not self._directory.is_dir() or self._manager.latest_step() is None:
            return 0, states
        import orbax.checkpoint as ocp

        epochs = self._manager.latest_step()
        try:
            packed = self._manager.restore(epochs, args=ocp.args.StandardRestore(_pack(states)))
        except (KeyError, TypeError, ValueError):  # other dtypes
            packed = {"structure": None}
        if packed["structure"] != _structure(states):
            raise CheckpointError(
                f"{self._directory}: the checkpoint holds other variables than this version of "
                "the networks; go on with the version that wrote it, or start a new run"
            )
        return epochs, _unpack(packed, states)

    @cached_property
    def _manager(self) -> Any:
        import orbax.checkpoint as ocp  # a third of a second, after the first epoch's line

        options = ocp.CheckpointManagerOptions(max_to_keep=KEEP)
        return ocp.CheckpointManager(self._directory, options=options)


def _pack(states: Any) -> dict[str, np.ndarray]:
    """All leaves end to end, one vector per dtype: orbax's time goes by the number of arrays."""
    vectors: dict[str, list[np.ndarray]] = {}
    for leaf in jax.tree.leaves(states):
        vectors.setdefault(leaf.dtype.name, []).append(np.ravel(leaf))
    packed = {dtype: np.concatenate(parts) for dtype, parts in vectors.items()}
    return {**packed, "structure": _structure(states)}


def _unpack(packed: dict[str, np.ndarray], states: Any) -> Any:
    used = dict.fromkeys(packed, 0)

    def take(leaf: jax.Array) -> jax.Array:
        start = used[leaf.dtype.name]
        used[leaf.dtype.name] += leaf.size
        values = packed[leaf.dtype.name][start : start + leaf.size]
        return jax.device_put(values.reshape(leaf.shape), leaf.sharding)

    return jax.tree.map(take, states)


def _structure(states: Any) -> np.ndarray:
    """A checksum of the names, shapes and dtypes of all leaves."""
    leaves, _ = jax.tree.flatten_with_path(states)
    told = [(jax.tree_util.keystr(path), leaf.shape, leaf.dtype.name) for path, leaf in leaves]
    return np.array(zlib.crc32(repr(told).encode()), np.uint32)

"""A run that was saved, opened once."""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from flax.traverse_util import unflatten_dict

from bnjax import checkpoint
from bnjax.errors import CheckpointError
from experiments.lab import arms as table
from experiments.lab import divergences, metrics, rundir
from experiments.lab.arms import ArmSpec
from experiments.lab.metrics import Curves
from experiments.lab.presets import Experiment, from_json


class Arrays(dict[str, np.ndarray]):
    """The arrays of a file, which says of one that it lacks."""

    def __init__(self, file: Path, arrays: Mapping[str, np.ndarray]) -> None:
        super().__init__(arrays)
        self._file = file

    def __missing__(self, name: str) -> np.ndarray:
        told = f"{self._file} lacks {name}: another version saved them, or they are damaged"
        raise CheckpointError(told)


class Run:
    """A run directory: what it compares, its metrics as arrays, and what was trained.

    Attributes:
        path: of the directory.
        config: `config.json`.
        experiment: the settings that decided its numbers.
        arms: their names, in order.
        reference: the arm that the others are held against.
        labels: `{arm: label}` for pictures.
        titles: `{arm: title}` for tables and sentences.

    Raises:
        ValueError: if it has no such arm or replicate, or an arm of one's own was not given.
        CheckpointError: if a file is missing, damaged, or of another version.

    Example:
        run = Run("runs/first")
        model, variables = run.model("bn"), run.variables("bn")
        logits = model.apply(variables, images, train=False)  # images [N, 28, 28] in 0..1
    """

    def __init__(self, path: Path | str, own: Sequence[ArmSpec] = ()) -> None:
        """Opens a run, ended or not; `own` are arms of one's own among its arms, for `model`."""
        self.path = rundir.expand(Path(path))
        self.config = rundir.read_config(self.path)
        self._own = own
        try:
            self.experiment = from_json(Experiment, self.config["experiment"])
            self.arms = self.experiment.arms
            self.reference = str(self.experiment.reference)
            shown: Mapping[str, Mapping[str, str]] = self.config["arms"]
            self.labels, self.titles = (
                {arm: str(shown[arm][what]) for arm in self.arms} for what in ("label", "title")
            )
            self.others = [arm for arm in self.arms if arm != self.reference]
            if len(self.others) == len(self.arms):
                raise ValueError(f"its reference {self.reference} is none of its arms")
        except (KeyError, TypeError, ValueError) as error:
            file = self.path / "config.json"
            raise CheckpointError(f"{file} cannot be used: {error}") from error

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`."""
        return metrics.read(self.path, self.arms, self.experiment.replicates)

    @cached_property
    def metrics(self) -> Curves:
        """`{arm: {metric: [epochs, R] float64}}`, NaN from where a replicate diverged."""
        return metrics.curves(self.lines, self.arms)

    @property
    def epochs(self) -> int:
        """How many epochs are recorded in full."""
        return len(self.metrics[self.reference]["train_cost"])

    def summarize(self) -> dict[str, Any]:
        """The content of `summary.json`."""
        if not self.epochs:
            raise CheckpointError(f"{self.path} has no epoch yet: let it run")
        summary = metrics.summarize(self.metrics, self.reference)
        return {**summary, "divergences": divergences.read(self.path)}

    @property
    def lacks_end(self) -> bool:
        """Whether the last look inside is missing, though a replicate was finite to the end."""
        if (self.path / "probes" / "end.npz").exists() or not self.epochs:
            return False
        return metrics.replicate_to_look_into(self.metrics) is not None

    def probes(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays of `probes/NAME.npz`; None if they were not recorded."""
        file = self.path / "probes" / f"{name}.npz"
        if not file.exists():
            return None
        try:
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                return Arrays(file, arrays)
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
            told = f"{file} is damaged ({error}): delete it, and the rest can be drawn"
            raise CheckpointError(told) from None

    def model(self, arm: str) -> nn.Module:
        """The network of an arm, to be called as `model.apply(variables, x, train=False)`."""
        return table.find(self._known(arm), self._own).make(self.experiment)

    def variables(self, arm: str, replicate: int = 0) -> dict[str, Any]:
        """What a replicate of an arm has learned: `{"params": ..., "batch_stats": ...}`."""
        if not 0 <= replicate < self.experiment.replicates:
            raise ValueError(
                f"replicate is {replicate}: {self.path} has 0 to {self.experiment.replicates - 1}"
            )
        prefix = (self._known(arm),)
        file = checkpoint.file_of(self.path / "checkpoints", self.epochs)
        if not file.exists():
            raise CheckpointError(f"{file} is not there: go on with the run, or run it again")
        arrays, _ = checkpoint.load(file)
        paths = {tuple(name.split("/")): values for name, values in arrays.items()}
        collections = ("params", "batch_stats")
        own = {p[1:]: v[replicate] for p, v in paths.items() if p[:1] == prefix}
        return unflatten_dict({p: v for p, v in own.items() if p[0] in collections})

    def _known(self, arm: str) -> str:
        if arm not in self.arms:
            raise ValueError(f"{self.path} has no arm {arm!r}: it has {', '.join(self.arms)}")
        return arm

"""What commands share that train and leave no run: flags, and a directory to go on in."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from bnjax import data
from bnjax.data import Dataset
from experiments.lab import devices, exits, plan, rundir
from experiments.lab.options import flags
from experiments.lab.presets import Experiment


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """What each of them takes; they add flags of their own."""

    dataset: Annotated[str, tyro.conf.arg(metavar="|".join(data.NAMES))] = "auto"
    """What to train on; auto is MNIST where it can be had, otherwise the embedded digits."""

    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where the dataset's IDX files are."""

    seed: int = 0
    """Decides everything random."""

    def __post_init__(self) -> None:
        Experiment(dataset=self.dataset, seed=self.seed)  # knows what they may be


def set_up_jax() -> None:
    """As runs do, on every core."""
    devices.set_cpu_devices()
    plan.set_up_jax(Experiment())


@contextmanager
def directory(
    path: Path, decisive: Mapping[str, Any], config: CommonConfig, dataset: Dataset
) -> Iterator[None]:
    """Keeps a directory of results to this command: a new one, or one of the same settings.

    Of all settings, `decisive` are those that decide the results.
    """
    origin = {**rundir.provenance(), **devices.describe()}
    found = plan.describe_data(dataset, config.dataset)
    with exits.user_errors():
        data_dir = config.data_dir and str(rundir.expand(config.data_dir).absolute())
        if new := not (path / "config.json").exists():
            parts = {"experiment": decisive, "execution": {"data_dir": data_dir}, "dataset": found}
            rundir.create(path, parts | origin)
        saved = rundir.read_config(path)
        if saved["experiment"].keys() != decisive.keys():
            raise ValueError(f"{path} holds another kind of run: choose another --out directory")
        before, now = (
            {**settings, "data": f"{source['name']} {source['sha256'][:12]}"}
            for settings, source in ((saved["experiment"], saved["dataset"]), (decisive, found))
        )
        if changed := [f"{k} was {before[k]}, now {now[k]}" for k in now if before[k] != now[k]]:
            raise ValueError(f"{path} holds results with other settings: {', '.join(changed)}")
    with rundir.locked(path):
        if not new:
            resumed = [*saved.get("resumed", []), origin]
            rundir.write_json(path / "config.json", {**saved, "resumed": resumed})
        yield


def command(prog: str, config: CommonConfig) -> list[str]:
    """The words that run the same again: a program, and its flags that are not the defaults."""
    values = {f: getattr(config, f.name) for f in dataclasses.fields(config)}
    changed = {f.name: value for f, value in values.items() if value != f.default}
    return [*prog.split(), *changed.pop("claims", ()), *flags(changed)]

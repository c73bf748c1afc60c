"""What commands share that train and leave no run: flags, and a directory to go on in."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from bnjax import data
from bnjax.data import Dataset
from experiments.lab import devices, exits, rundir
from experiments.lab.options import flags
from experiments.lab.plan import describe
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
    """Computes as runs do: on every core, in float32, with programs compiled before."""
    devices.set_cpu_devices()
    if cache := data.cache_directory():
        devices.enable_compilation_cache(cache / "programs")
    jax.config.update("jax_default_matmul_precision", Experiment.matmul_precision)


@contextlib.contextmanager
def directory(
    path: Path, decisive: Mapping[str, Any], config: CommonConfig, dataset: Dataset
) -> Iterator[None]:
    """Keeps a directory to this command, as `rundir.claim_directory`; what is wrong with it is the
    user's mistake. `decisive` are the settings that decide the results, `config` all of them.
    """
    with contextlib.ExitStack() as stack:
        with exits.user_errors():
            described = describe(dict(decisive), dataset, config.dataset, config.data_dir)
            stack.enter_context(rundir.claim_directory(path, *described))
        yield


def command(prog: str, config: CommonConfig) -> list[str]:
    """The words that run the same again: a program, and its flags that are not the defaults."""
    values = {f: getattr(config, f.name) for f in dataclasses.fields(config)}
    changed = {f.name: value for f, value in values.items() if value != f.default}
    return [*prog.split(), *changed.pop("claims", ()), *flags(changed)]

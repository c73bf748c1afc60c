"""The command line of an experiment: two frozen dataclasses, shown as one flat list of flags."""

import argparse
import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from bnjax.names import choose
from bnjax.parallel.mesh import parse_mesh
from experiments.lab import rundir
from experiments.lab.presets import PRESETS, Experiment, from_json


@dataclass(frozen=True)
class Execution:
    """Everything about a run that does not decide its numbers."""

    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where the dataset's IDX files are, gzipped or not, flat or as torchvision arranges them,
    or a TFDS directory; without it: $BNJAX_DATA_DIR, TFDS's own directory, or a download that is
    kept."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Run directory to create; by default runs/PRESET-DATASET-TIME."""

    resume: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Run directory to go on in, with its own settings; only --epochs may grow."""

    mesh: Annotated[str, tyro.conf.arg(metavar="replicate=N,data=M")] = "auto"
    """Devices to spread replicates and the examples of each batch over; auto takes at most one core
    (or accelerator) for each replicate, and never spreads a batch."""

    distributed: bool = False
    """Join other processes that run the same command: those that SLURM, Open MPI or Kubernetes
    started, or as the next three say."""

    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Where process 0 is to be found."""

    num_processes: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """How many processes there are."""

    process_id: Annotated[int | None, tyro.conf.arg(metavar="K")] = None
    """Which one this is, from 0."""

    open: bool = False
    """Open the report in the browser when it is there."""

    feature_digit: Annotated[int, tyro.conf.arg(metavar="0..9")] = 6
    """Class of the test example whose activations are recorded after each epoch and drawn."""

    cache: bool = True
    """Keep compiled programs in $XDG_CACHE_HOME/bnjax, so that the next run starts sooner."""

    progress: bool = True
    """Show a progress bar where the output is a terminal."""

    def __post_init__(self) -> None:
        if self.mesh != "auto":
            parse_mesh(self.mesh)
        if not 0 <= self.feature_digit <= 9:
            raise ValueError(f"feature_digit is {self.feature_digit}: expected 0 to 9")
        manual = (self.coordinator, self.num_processes, self.process_id)
        if any(part is not None for part in manual) and (None in manual or not self.distributed):
            raise ValueError(
                "--coordinator, --num-processes and --process-id belong together, and to "
                "--distributed"
            )
        if self.process_id is not None and not 0 <= self.process_id < (self.num_processes or 0):
            raise ValueError(
                f"process_id is {self.process_id}: expected 0 to {(self.num_processes or 0) - 1}"
            )
        if self.out and self.resume:
            raise ValueError("--out and --resume exclude each other: a run goes on where it is")

    def saved(self) -> dict[str, Any]:
        """What a configuration keeps: not what belongs to one start alone."""
        start = ("distributed", "coordinator", "num_processes", "process_id", "open")
        values = dataclasses.asdict(self) | {name: getattr(Execution, name) for name in start}
        return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


@dataclass(frozen=True)
class Options:
    """Both at once, for tyro."""

    experiment: Experiment
    execution: Execution


def read(
    arguments: Sequence[str], prog: str, description: str
) -> tuple[Options, dict[str, Any] | None]:
    """The command line over the defaults of its preset, or of the run that it resumes.

    Returns:
        The options, and the configuration of a run that is resumed. After a usage error, or the
        help, tyro ends the program.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?")
    parser.add_argument("--resume", nargs="?", type=Path)
    first, _ = parser.parse_known_args(arguments)
    resume = first.resume and rundir.expand(first.resume)
    if resume:
        saved = rundir.read_config(resume)
        defaults = _saved_options(saved, resume)
    else:
        saved = None
        preset = choose("preset", first.preset or Experiment.preset, PRESETS)
        defaults = Options(PRESETS[preset], Execution())
    chosen = tyro.cli(
        Options,
        args=list(arguments),
        default=defaults,
        prog=prog,
        description=description,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    if resume:
        _check_resumable(defaults, chosen, resume)
        chosen = Options(chosen.experiment, dataclasses.replace(chosen.execution, resume=resume))
    return chosen, saved


def _saved_options(saved: Mapping[str, Any], resume: Path) -> Options:
    try:
        execution = from_json(Execution, saved["execution"])
        data_dir = execution.data_dir and Path(execution.data_dir)
        execution = dataclasses.replace(execution, data_dir=data_dir, out=None, resume=resume)
        return Options(from_json(Experiment, saved["experiment"]), execution)
    except ValueError as error:
        raise ValueError(f"{resume / 'config.json'} cannot be used: {error}") from error


def _check_resumable(before: Options, after: Options, path: Path) -> None:
    changed = changes(before.experiment, after.experiment)
    old, new = changed.pop("epochs", (0, 0))
    if new < old:
        raise ValueError(f"{path} was started for {old} epochs: epochs may only grow, not {new}")
    if changed:
        told = ", ".join(f"{name} was {a}, now {b}" for name, (a, b) in changed.items())
        raise ValueError(f"{path} cannot go on with other settings: {told}")
    if after.execution.feature_digit != before.execution.feature_digit:
        raise ValueError(f"{path} records another test digit: --feature-digit cannot change")


def changes(before: Experiment, after: Experiment) -> dict[str, tuple[Any, Any]]:
    """The fields in which two experiments differ: `{name: (before, after)}`."""
    a, b = dataclasses.asdict(before), dataclasses.asdict(after)
    return {name: (a[name], b[name]) for name in a if a[name] != b[name]}


def command(experiment: Experiment) -> str:
    """The command that runs an experiment: its preset, and the flags that differ from it."""
    default = PRESETS[experiment.preset]
    if experiment.reference == dataclasses.replace(experiment, reference=None).resolved().reference:
        experiment = dataclasses.replace(experiment, reference=None)
    changed = {name: value for name, (_, value) in changes(default, experiment).items()}
    start = ["python", "-m", "experiments.mnist_bn", "--preset", experiment.preset]
    return shlex.join([*start, *flags(changed)])


def flags(values: Mapping[str, Any]) -> list[str]:
    """Settings as they stand on a command line.

    Example:
        >>> flags({"drop_last": False, "hidden_sizes": (32, 32)})
        ['--no-drop-last', '--hidden-sizes', '32', '32']
    """
    words: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            several = value if isinstance(value, tuple) else (value,)
            words += [f"--{flag}", *map(str, several)]
    return words


def repeat(config: Mapping[str, Any]) -> str:
    """The command that repeats a saved run; where its data lie is left open.

    Statistics of each device's own examples depend on the mesh, which is then part of it.
    """
    experiment = from_json(Experiment, config["experiment"])
    words = [command(experiment)]
    if config["execution"].get("data_dir"):
        words.append("--data-dir DIR")
    if experiment.bn_statistics == "local":
        words.append("--mesh " + ",".join(f"{axis}={n}" for axis, n in config["mesh"].items()))
    return " ".join(words)

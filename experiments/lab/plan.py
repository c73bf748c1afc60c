"""From the command line to a run that is ready to start."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import optax
from rich.console import Console

from bnjax import data, initializers, models
from bnjax.data import Dataset
from bnjax.errors import DataWarning
from bnjax.paired import Arm, Lane
from bnjax.parallel import processes
from experiments.lab import devices, options, probes, rundir
from experiments.lab.console import noting, open_report, print_plain
from experiments.lab.options import Options
from experiments.lab.presets import Experiment


@dataclass(frozen=True)
class Plan:
    """A run that is ready to start: everything checked, nothing written yet."""

    options: Options
    dataset: Dataset
    config: dict[str, Any]
    path: Path
    lanes: list[Lane]


def prepare(arguments: Sequence[str], prog: str, description: str, console: Console) -> Plan | None:
    """Reads the command line, loads the data and checks everything; None if nothing is left to do.

    Args:
        arguments: the command line, without the program.
        prog: the program, for its help.
        description: what the help begins with.
        console: where to note what the user should know.

    Raises:
        ValueError: with one sentence for the user.
        SystemExit: with status 2 after tyro has shown a usage error, with 0 after the help.
    """
    chosen, saved = _read_options(arguments, prog, description)
    execution = chosen.execution
    if execution.distributed:
        _join(chosen, console)
    if execution.resume:
        finished = rundir.is_finished(execution.resume, chosen.experiment.epochs)
        finished = finished and not probes.end_is_missing(execution.resume)
        if processes.tell_all(finished)[0]:
            told = f"{execution.resume} is finished: {chosen.experiment.epochs} epochs"
            print_plain(console, f"{told}; --epochs can add to them")
            if execution.open and processes.is_first():
                open_report(execution.resume)
            return None
    plan = processes.together(partial(_plan, chosen, saved, console))
    processes.check_same({"data": plan.config["dataset"], "mesh": dict(plan.lanes[0].mesh.shape)})
    return dataclasses.replace(plan, path=Path(processes.tell_all(str(plan.path))[0]))


def _join(chosen: Options, console: Console) -> None:
    execution = chosen.execution
    if execution.process_id == 0:
        told = f"{execution.num_processes} processes at {execution.coordinator}"
        print_plain(console, f"waiting for {told}, at most {processes.PATIENCE} seconds")
    devices.join_processes(execution)
    console.quiet = not processes.is_first()
    processes.check_same(
        {
            **dataclasses.asdict(chosen.experiment),
            **rundir.provenance(),
            "float": jax.dtypes.canonicalize_dtype(float).name,
            "processes": execution.num_processes,
            "resume": str(execution.resume),
            "mesh": execution.mesh,
            "feature_digit": execution.feature_digit,
        }
    )


def _plan(chosen: Options, saved: dict[str, Any] | None, console: Console) -> Plan:
    """What this process finds on its own."""
    experiment, execution = chosen.experiment, chosen.execution
    out = execution.out and rundir.expand(execution.out)
    if out and processes.is_first():
        rundir.check_free(out)

    dataset = load_data(experiment.dataset, execution.data_dir, console)
    experiment.check_against(dataset)
    found = {"name": dataset.name, "sha256": data.fingerprint(dataset)}
    requested = saved["dataset"]["requested"] if saved else experiment.dataset
    if saved and saved["dataset"]["sha256"] != found["sha256"]:
        raise ValueError(
            f"{execution.resume} was trained on other data: its {saved['dataset']['name']} has the "
            f"SHA-256 {saved['dataset']['sha256']}, this {found['name']} has {found['sha256']}"
        )

    if execution.cache and (cache := data.cache_directory()):
        devices.cache_programs(cache / "programs")
    jax.config.update("jax_default_matmul_precision", experiment.matmul_precision)
    lanes = devices.make_lanes(make_arms(experiment), execution.mesh, experiment.replicates)
    mesh = dict(lanes[0].mesh.shape)
    _check_statistics(experiment, mesh, len(dataset.train_labels), saved)
    check_memory(experiment, devices.memory(lanes))
    path = execution.resume or out or rundir.default_path(experiment.preset, dataset.name)
    data_dir = execution.data_dir and rundir.expand(execution.data_dir).absolute()
    experiment = dataclasses.replace(experiment, dataset=dataset.name)
    execution = dataclasses.replace(execution, data_dir=data_dir)
    origin = {**rundir.provenance(), **devices.describe(), "mesh": mesh}
    if saved:
        config = {**saved, "resumed": [*saved.get("resumed", []), origin]}
    else:
        dataset_values = {**found, "requested": requested}
        saved_execution = _jsonable(dataclasses.asdict(execution.lasting()))
        config = {"execution": saved_execution, "dataset": dataset_values}
        config |= origin
    config = {**config, "experiment": dataclasses.asdict(experiment)}
    return Plan(Options(experiment, execution), dataset, config, path, lanes)


def _read_options(
    arguments: Sequence[str], prog: str, description: str
) -> tuple[Options, dict[str, Any] | None]:
    preset, resume = options.preset_and_resume(arguments)
    if not resume:
        return options.parse(arguments, options.preset_defaults(preset), prog, description), None
    resume = rundir.expand(resume)
    saved = rundir.read_config(resume)
    try:
        before = Experiment.load(saved["experiment"])
        defaults = Options(before, options.Execution.load(saved["execution"], resume))
    except ValueError as error:
        raise ValueError(f"{resume / 'config.json'} cannot be used: {error}") from error
    chosen = options.parse(arguments, defaults, prog, description)
    _check_resumable(before, chosen.experiment, resume)
    if chosen.execution.feature_digit != defaults.execution.feature_digit:
        raise ValueError(f"{resume} records another test digit: --feature-digit cannot change")
    return Options(chosen.experiment, dataclasses.replace(chosen.execution, resume=resume)), saved


def make_arms(experiment: Experiment) -> tuple[Arm, ...]:
    """The network with batch normalization and its twin without, each with Adam."""

    def arm(name: str, use_batch_norm: bool, init: str) -> Arm:
        module = models.MLP(
            hidden_sizes=experiment.hidden_sizes,
            num_classes=experiment.num_classes,
            use_batch_norm=use_batch_norm,
            activation=models.activation(experiment.activation),
            kernel_init=initializers.kernel(init),
        )
        return Arm(name, module, optax.adam(experiment.learning_rate))

    no_bn_init = experiment.bn_init if experiment.shared_init else experiment.no_bn_init
    return arm("bn", True, experiment.bn_init), arm("no_bn", False, no_bn_init)


def describe(
    settings: dict[str, Any], dataset: data.Dataset, requested: str, data_dir: Path | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `rundir.occupied` keeps of results that are no run: their settings, and their origin."""
    config = {
        "experiment": settings,
        "execution": {"data_dir": data_dir and str(rundir.expand(data_dir).absolute())},
        "dataset": {
            "name": dataset.name,
            "sha256": data.fingerprint(dataset),
            "requested": requested,
        },
    }
    return config, {**rundir.provenance(), **devices.describe()}


def check_memory(experiment: Experiment, available: int) -> None:
    """Refuses what cannot fit, before a system without memory ends the program without a word.

    A parameter takes 12 bytes in each network, Adam's two moments among them; with its gradient,
    the state that a step returns and the checkpoint on its way to the disk about three times that.

    Raises:
        ValueError: if more than `available` bytes are needed.
    """
    sizes = (28 * 28, *experiment.hidden_sizes, experiment.num_classes)
    parameters = sum((fan_in + 1) * size for fan_in, size in pairwise(sizes))
    needed = 2 * 3 * 12 * experiment.replicates * parameters
    needed += 2 * 2 * 4 * experiment.batch_size * sum(sizes)  # a batch's features and gradients
    if needed > available:
        raise ValueError(
            f"out of memory: these settings need about {needed / 1e9:.3g} GB and there are "
            f"{available / 1e9:.3g} GB; choose smaller --hidden-sizes, a smaller --batch-size or "
            "fewer --replicates"
        )


def _check_statistics(
    experiment: Experiment, mesh: dict[str, int], examples: int, saved: dict[str, Any] | None
) -> None:
    if experiment.bn_statistics == "global":
        return
    experiment.check_local(mesh["data"], examples)
    before = saved.get("mesh") if saved else mesh
    if not isinstance(before, dict) or before.get("data") != mesh["data"]:
        raise ValueError(
            f"local statistics depend on how many devices share a batch: the run had the mesh "
            f"{before}, now it is {mesh}; choose a --mesh with the same data"
        )


def _check_resumable(before: Experiment, after: Experiment, path: Path) -> None:
    changed = options.changes(before, after)
    old, new = changed.pop("epochs", (0, 0))
    if new < old:
        raise ValueError(f"{path} was started for {old} epochs: epochs may only grow, not {new}")
    if changed:
        told = ", ".join(f"{name} was {a}, now {b}" for name, (a, b) in changed.items())
        raise ValueError(f"{path} cannot go on with other settings: {told}")


def load_data(name: str, directory: Path | None, console: Console) -> Dataset:
    """The dataset, and on the console what the user should know about it.

    Raises:
        ValueError: as `bnjax.data.load`.
    """
    with noting(console, DataWarning):
        return data.load(name, directory and rundir.expand(directory))


def _jsonable(values: dict[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}

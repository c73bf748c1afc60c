"""From settings or the command line to a run that is ready to start."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from bnjax import data, paired
from bnjax.data import Dataset
from bnjax.errors import DataWarning
from bnjax.paired import Arm, Trainer
from bnjax.parallel import processes
from bnjax.training import AnyArray, create_state
from experiments.lab import arms, devices, options, rundir, scratch
from experiments.lab.arms import ArmSpec
from experiments.lab.console import open_report, print_plain, show_warnings
from experiments.lab.options import Options
from experiments.lab.presets import Experiment
from experiments.lab.run import Run


@dataclass(frozen=True)
class Plan:
    """A run that is ready to start: everything checked, nothing written yet."""

    options: Options
    config: dict[str, Any]
    path: Path
    trainer: Trainer


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
    if chosen.execution.distributed:
        _join(chosen, console)
    if resume := chosen.execution.resume:
        finished = rundir.is_finished(resume, chosen.experiment.epochs)
        finished = finished and not Run(resume).lacks_end
        if processes.allgather_object(finished)[0]:
            told = f"{resume} is finished: {chosen.experiment.epochs} epochs"
            print_plain(console, f"{told}; --epochs can add to them")
            if chosen.execution.open and processes.is_first():
                open_report(resume)
            return None
    plan = processes.run_on_all(partial(make, chosen, console, saved=saved))
    mesh = dict(plan.trainer.placements[0].mesh.shape)
    processes.check_same({"data": plan.config["dataset"], "mesh": mesh})
    return dataclasses.replace(plan, path=Path(processes.allgather_object(str(plan.path))[0]))


def _join(chosen: Options, console: Console) -> None:
    execution = chosen.execution
    if execution.process_id == 0:
        told = f"{execution.num_processes} processes at {execution.coordinator}"
        print_plain(console, f"waiting for {told}, at most {processes.PATIENCE} seconds")
    devices.join_processes(
        execution.mesh, execution.coordinator, execution.num_processes, execution.process_id
    )
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


def make(
    chosen: Options,
    console: Console,
    *,
    own: Sequence[ArmSpec] = (),
    saved: dict[str, Any] | None = None,
) -> Plan:
    """What this process finds on its own.

    Args:
        chosen: what to run.
        console: where to note what the user should know.
        own: arms of one's own among those of the experiment.
        saved: the configuration of the run that is resumed.

    Raises:
        ValueError: with one sentence for the user.
    """
    experiment, execution = chosen.experiment.resolved(), chosen.execution
    out = execution.out and rundir.expand(execution.out)
    if out and processes.is_first():
        rundir.check_free(out)
    specs = arms.choose(experiment, own)

    dataset = load_data(experiment.dataset, execution.data_dir, console)
    experiment.check_against(dataset)
    arms.check_sizes(experiment, len(dataset.train_labels))
    found = describe_data(dataset, saved["dataset"]["requested"] if saved else experiment.dataset)
    if saved and saved["dataset"]["sha256"] != found["sha256"]:
        raise ValueError(
            f"{execution.resume} was trained on other data: its {saved['dataset']['name']} has the "
            f"SHA-256 {saved['dataset']['sha256']}, this {found['name']} has {found['sha256']}"
        )

    if execution.cache and (cache := data.cache_directory()):
        devices.enable_compilation_cache(cache / "programs")
    jax.config.update("jax_default_matmul_precision", experiment.matmul_precision)
    made = arms.make_arms(experiment, own)
    placements = devices.make_placements(made, execution.mesh, experiment.replicates)
    mesh = dict(placements[0].mesh.shape)
    _check_statistics(experiment, mesh, len(dataset.train_labels), saved)
    train, test = scratch.batches(dataset)
    check_memory(made, experiment.replicates, train.images, devices.memory(placements))
    trainer = Trainer(
        placements,
        paired.replicate_keys(experiment.seed, experiment.replicates),
        train,
        test,
        experiment.batch_size,
        experiment.drop_last,
        experiment.bn_statistics,
        experiment.shared_init,
    )
    path = execution.resume or out or rundir.default_path(experiment.preset, dataset.name)
    data_dir = execution.data_dir and rundir.expand(execution.data_dir).absolute()
    experiment = dataclasses.replace(experiment, dataset=dataset.name)
    execution = dataclasses.replace(execution, data_dir=data_dir)
    origin = {**rundir.provenance(), **devices.describe(), "mesh": mesh}
    if saved:
        config = {**saved, "resumed": [*saved.get("resumed", []), origin]}
    else:
        shown = {
            spec.name: {"label": spec.label, "title": spec.title or spec.label} for spec in specs
        }
        config = {"execution": execution.saved(), "dataset": found, "arms": shown, **origin}
    config = {**config, "experiment": dataclasses.asdict(experiment)}
    return Plan(Options(experiment, execution), config, path, trainer)


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


def describe_data(dataset: Dataset, requested: str) -> dict[str, str]:
    """What a configuration keeps of the data."""
    return {
        "name": dataset.name,
        "sha256": data.fingerprint(dataset),
        "requested": requested,
    }


def check_memory(made: Sequence[Arm], replicates: int, images: AnyArray, available: int) -> None:
    """Refuses what cannot fit, before a system without memory ends the program without a word.

    A training state is there about three times: before and after a step, and as the checkpoint on
    its way to the disk.

    Raises:
        ValueError: if more than `available` bytes are needed.
    """
    key = jax.random.key(0)
    states = [
        jax.eval_shape(partial(create_state, arm.module, arm.optimizer), key, images[:2])
        for arm in made
    ]
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(states))
    if (needed := 3 * replicates * size) > available:
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
    with show_warnings(console, DataWarning):
        return data.load(name, directory and rundir.expand(directory))

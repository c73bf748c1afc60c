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
from bnjax.paired import Placement, Trainer
from bnjax.parallel import processes
from bnjax.training import create_state
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

    The first three arguments are those of `options.read`.
    """
    chosen, saved = options.read(arguments, prog, description)
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
    """
    experiment, execution = chosen.experiment.resolved(), chosen.execution
    out = execution.out and rundir.expand(execution.out)
    if out and processes.is_first():
        rundir.check_free(out)
    specs = arms.choose(experiment, own)

    dataset = load_data(experiment.dataset, execution.data_dir, console)
    found = describe_data(dataset, saved["dataset"]["requested"] if saved else experiment.dataset)
    if saved and saved["dataset"]["sha256"] != found["sha256"]:
        raise ValueError(
            f"{execution.resume} was trained on other data: its {saved['dataset']['name']} has the "
            f"SHA-256 {saved['dataset']['sha256']}, this {found['name']} has {found['sha256']}"
        )

    set_up_jax(experiment, execution.cache)
    trainer = Trainer(
        place_arms(experiment, dataset, execution.mesh, own=own),
        paired.replicate_keys(experiment.seed, experiment.replicates),
        *scratch.batches(dataset),
        experiment.batch_size,
        experiment.drop_last,
        experiment.bn_statistics,
        experiment.shared_init,
    )
    mesh = dict(trainer.placements[0].mesh.shape)
    if experiment.bn_statistics == "local":
        _check_local(experiment, mesh, len(dataset.train_labels), saved)
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


def set_up_jax(experiment: Experiment, cache: bool = True) -> None:
    """Computes in the experiment's precision, and keeps compiled programs for the next run."""
    if cache and (directory := data.cache_directory()):
        devices.enable_compilation_cache(directory / "programs")
    jax.config.update("jax_default_matmul_precision", experiment.matmul_precision)


def describe_data(dataset: Dataset, requested: str) -> dict[str, str]:
    """What a configuration keeps of the data."""
    return {"name": dataset.name, "sha256": data.fingerprint(dataset), "requested": requested}


def place_arms(
    experiment: Experiment,
    dataset: Dataset,
    mesh: str = "auto",
    *,
    cells: int = 1,
    own: Sequence[ArmSpec] = (),
) -> list[Placement]:
    """The arms of an experiment on devices, for all replicates of so many cells of a sweep.

    Refuses also what cannot fit, before a system without memory ends the program without a word. A
    training state is there about three times: before and after a step, and as the checkpoint on its
    way to the disk.
    """
    made, count = arms.make_arms(experiment, own), cells * experiment.replicates
    experiment.check_against(dataset)
    arms.check_sizes(experiment, len(dataset.train_labels))
    placements = devices.make_placements(made, mesh, count)
    key, images = jax.random.key(0), dataset.train_images[:2]
    states = [
        jax.eval_shape(partial(create_state, arm.module, arm.optimizer), key, images)
        for arm in made
    ]
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(states))
    if (needed := 3 * count * size) > (available := devices.memory(placements)):
        raise ValueError(
            f"out of memory: these settings need about {needed / 1e9:.3g} GB and there are "
            f"{available / 1e9:.3g} GB; choose smaller --hidden-sizes, a smaller --batch-size or "
            "fewer --replicates"
        )
    return placements


def _check_local(
    experiment: Experiment, mesh: dict[str, int], examples: int, saved: dict[str, Any] | None
) -> None:
    """Local statistics want equal parts of two examples or more, and the same in all epochs."""
    count, size = mesh["data"], experiment.batch_size
    last = 0 if experiment.drop_last else examples % size
    for batch in (size, last or size):
        if batch % count or batch < 2 * count:
            raise ValueError(
                f"bn_statistics local: a batch of {batch} cannot be dealt to {count} devices in "
                "equal parts of two or more; choose another --batch-size, --mesh or --drop-last"
            )
    before = saved.get("mesh") if saved else mesh
    if not isinstance(before, dict) or before.get("data") != count:
        raise ValueError(
            f"local statistics depend on how many devices share a batch: the run had the mesh "
            f"{before}, now it is {mesh}; choose a --mesh with the same data"
        )


def load_data(name: str, directory: Path | None, console: Console) -> Dataset:
    """The dataset, and on the console what the user should know about it."""
    with show_warnings(console, DataWarning):
        return data.load(name, directory and rundir.expand(directory))

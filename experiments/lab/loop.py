"""The loop of a run: trains, evaluates, looks inside, records and saves, epoch by epoch."""

import dataclasses
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bnjax import checkpoint
from bnjax.errors import CheckpointError, CheckpointWarning
from bnjax.paired import States
from bnjax.parallel import processes
from bnjax.training import take
from experiments.lab import console as display
from experiments.lab import divergences, exits, metrics, plan, probes, rundir
from experiments.lab.arms import ArmSpec
from experiments.lab.options import Execution, Options
from experiments.lab.plan import Plan
from experiments.lab.presets import Experiment
from experiments.lab.progress import epoch_lines
from experiments.lab.run import Run


def resume_command(path: Path) -> list[str]:
    """The words that go on with a run; none where there is none yet."""
    command = ["python", "-m", "experiments.mnist_bn", "--resume", str(path)]
    return command if (path / "config.json").exists() else []


def train(experiment: Experiment, out: Path | str, own: Sequence[ArmSpec] = ()) -> Run:
    """Runs an experiment from its start, in the run directory `out` that it creates.

    Among the arms that it names may be one's `own`, which the table does not have.

    Raises:
        ValueError: if the experiment cannot run.
    """
    console = Console()
    made = plan.make(Options(experiment, Execution(out=Path(out))), console, own=own)
    rundir.create(made.path, made.config)
    with rundir.locked(made.path):
        run(made, console)
    return Run(made.path, own)


def run(made: Plan, console: Console, raise_if_stopped: Callable[[], None] = lambda: None) -> None:
    """Trains and records what is left of a run, whose directory is there.

    `raise_if_stopped` is called after each epoch.
    """
    experiment, execution = made.options.experiment, made.options.execution
    trainer, path, arms = made.trainer, made.path, experiment.arms
    digit = np.array([np.argmax(trainer.test.labels == execution.feature_digit)])
    example = take(trainer.test, digit)
    image, label = (np.asarray(values[0]) for values in example)
    rundir.write_arrays(path / "probes" / "example.npz", {"image": image, "label": label})
    decisive = {**dataclasses.asdict(experiment), "epochs": None}
    settings = json.dumps({**decisive, "data": made.config["dataset"]["sha256"]})
    checkpoints = checkpoint.Checkpoints(path / "checkpoints", settings)
    done, states, known = _restore(made, checkpoints, console)
    labels = {arm: shown["label"] for arm, shown in made.config["arms"].items()}
    titles = {arm: shown["title"] for arm, shown in made.config["arms"].items()}
    count, bar = len(trainer.train.labels), execution.progress
    epochs = trainer.epochs(states, range(done + 1, experiment.epochs + 1))
    with epoch_lines(console, titles, experiment, done, bar, count) as show:
        for epoch in epochs:
            steps, on_train, on_test = processes.gather((epoch.steps, epoch.train, epoch.test))
            epoch = epoch._replace(steps=steps, train=on_train, test=on_test)
            lines = metrics.lines_of(epoch, arms)
            metrics.append(path, lines)
            what = f"what happens inside after epoch {epoch.number} could not be recorded"
            with exits.optional(console, what, "the report will be without it"):
                seen = probes.after_epoch(trainer, epoch.states, example)
                rundir.write_arrays(path / "probes" / f"epoch-{epoch.number:03}.npz", seen)
            show(lines)

            found = divergences.find(epoch, known)
            what = "the first layer that was not finite could not be found"
            with exits.optional(console, what, "epoch and step are known"):
                divergences.locate(found, trainer, epoch, checkpoints)
            for one in found:
                display.print_plain(console, f"NOTE: {divergences.describe(one, labels)}")
            known += found
            if found:
                rundir.write_json(path / divergences.FILE, known)
            checkpoints.save(epoch.number, epoch.states)
            states = epoch.states
            raise_if_stopped()
    what = "what the networks have become could not be recorded"
    with exits.optional(console, what, f"{shlex.join(resume_command(path))} tries again"):
        _inspect_end(made, states)


def _restore(
    made: Plan, checkpoints: checkpoint.Checkpoints, console: Console
) -> tuple[int, States, list[dict[str, Any]]]:
    """Epochs done, the states after them and their divergences; files say no more than that."""
    path, experiment = made.path, made.options.experiment
    lines = metrics.read(path, experiment.arms, experiment.replicates)
    recorded = len(lines) // (len(experiment.arms) * experiment.replicates)
    with display.show_warnings(console, CheckpointWarning):
        done, states = checkpoints.restore(made.trainer.initial_states(), at_most=recorded)
    if done < recorded and rundir.is_finished(path, experiment.epochs):
        raise CheckpointError(
            f"{path} is finished, but has no state of its last epoch to look into any more"
        )
    (path / "probes" / "end.npz").unlink(missing_ok=True)  # of fewer epochs
    metrics.write(path, [line for line in lines if line["epoch"] <= done])
    known = processes.allgather_object(divergences.truncate(path, done))[0]
    if made.options.execution.resume:
        display.print_plain(console, f"going on after epoch {done}")
        rundir.write_json(path / "config.json", made.config)
    return done, states, known


def _inspect_end(made: Plan, states: States) -> None:
    """Saves what a replicate that stayed finite has become, if there is one."""
    run = Run(made.path) if processes.is_first() else None
    replicate = processes.allgather_object(run and metrics.replicate_to_look_into(run.metrics))[0]
    if replicate is not None:
        seen = probes.at_end(made.trainer, states, replicate)
        rundir.write_arrays(made.path / "probes" / "end.npz", seen)

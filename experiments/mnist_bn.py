"""Trains a network with batch normalization and its twin without it on the same batches.

Presets, each the setting of a notebook; all their values are flags below:

    boostcourse   784-32-32-512, Adam 1e-3, batches of 100, 15 epochs
    lab10         784-32-32-10, Adam 1e-2, batches of 32, 11 epochs
    deep10        ten hidden layers of 64, Adam 1e-3, batches of 64, 9 epochs

Examples:

    python -m experiments.mnist_bn
    python -m experiments.mnist_bn --preset deep10 --replicates 5
    python -m experiments.mnist_bn --learning-rate 0.01 --hidden-sizes 64 64 64
    python -m experiments.mnist_bn --resume runs/DIR --epochs 30

It prints a line per epoch and leaves a run directory: the numbers
(metrics.jsonl, summary.json), the settings (config.json), pictures, and
report.html, which opens without a network.

Exit status: 0 success; 1 another process is lost; 2 a mistake in the command, the settings or the
data; 3 every replicate of one network diverged; 130 after Ctrl-C, 143 after SIGTERM.
"""

import contextlib
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import absl.logging
import jax
import numpy as np
from rich.console import Console

from bnjax import checkpoint, paired
from bnjax.errors import CheckpointError, CheckpointWarning
from bnjax.paired import States
from bnjax.parallel import processes
from bnjax.training import Batch
from experiments.lab import console as display
from experiments.lab import divergences, exits, metrics, probes, rundir
from experiments.lab.plan import Plan, prepare
from experiments.lab.rundir import ReportWarning

PROG = "python -m experiments.mnist_bn"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    absl.logging.set_verbosity(absl.logging.FATAL)  # orbax logs tracebacks of what it raises
    console = Console()
    path: Path | None = None

    def command(check: Callable[[], None]) -> int:
        nonlocal path
        with contextlib.ExitStack() as stack:
            with exits.mistakes():
                plan = prepare(arguments, PROG, __doc__ or "", console)
                if plan is None:
                    return 0
                processes.together(partial(_occupy, plan, stack))
            path = plan.path
            display.print_plain(console, f"run directory: {path}")
            if processes.count() > 1:  # JAX may end this process without another word
                again = shlex.join(_how_to_go_on(path))
                display.print_plain(console, f"should a process be lost, go on with: {again}")
            return run(plan, console, check)

    return exits.run(command, lambda: _how_to_go_on(path) if path else [])


def _occupy(plan: Plan, stack: contextlib.ExitStack) -> None:
    """Makes the directory of a new run, and keeps it to this command."""
    if processes.is_first():
        if not plan.options.execution.resume:
            rundir.create(plan.path, plan.config)
        stack.enter_context(rundir.locked(plan.path))


def _how_to_go_on(path: Path) -> list[str]:
    there = (path / "config.json").exists()
    return [*PROG.split(), "--resume", str(path)] if there else []


def run(plan: Plan, console: Console, check: Callable[[], None]) -> int:
    """Trains, evaluates and records every epoch, then draws the report; returns the exit status.

    Args:
        plan: what to run.
        console: where to show it.
        check: called after each epoch; raises if the run is to stop.
    """
    experiment, execution = plan.options.experiment, plan.options.execution
    dataset = plan.dataset
    train = Batch(dataset.train_images, dataset.train_labels)
    test = Batch(dataset.test_images, dataset.test_labels)
    example = _choose_example(test, execution.feature_digit)
    if processes.is_first():
        image, label = (np.asarray(values[0]) for values in example)
        rundir.write_arrays(plan.path / "probes" / "example.npz", {"image": image, "label": label})
    keys = paired.replicate_keys(experiment.seed, experiment.replicates)
    create = partial(
        paired.create_states,
        plan.lanes,
        keys,
        train.images[:2],
        shared_init=experiment.shared_init,
    )

    local = experiment.bn_statistics == "local"
    shares = plan.lanes[0].mesh.shape["data"] if local else 1
    decisive = {**dataclasses.asdict(experiment), "epochs": None}
    settings = json.dumps({**decisive, "data": plan.config["dataset"]["sha256"]})
    with checkpoint.Checkpoints(plan.path / "checkpoints", settings) as checkpoints:
        lines = metrics.read(plan.path, experiment.replicates)
        recorded = len(lines) // (len(metrics.ARMS) * experiment.replicates)
        with display.noting(console, CheckpointWarning):
            done, states = checkpoints.restore(create(), at_most=recorded)
        if done < recorded and rundir.is_finished(plan.path, experiment.epochs):
            raise CheckpointError(
                f"{plan.path} is finished, but has no state of its last epoch to look into any more"
            )
        marks: list[dict[str, Any]] = []
        if processes.is_first():
            (plan.path / "probes" / "end.npz").unlink(missing_ok=True)  # of fewer epochs
            metrics.truncate(plan.path, done)
            marks = divergences.truncate(plan.path, done)
        marks = processes.tell_all(marks)[0]
        if execution.resume:
            display.print_plain(console, f"going on after epoch {done}")
        if execution.resume and processes.is_first():
            rundir.write_json(plan.path / "config.json", plan.config)
        epochs = paired.run(
            plan.lanes,
            states,
            keys,
            train,
            test,
            epochs=range(done + 1, experiment.epochs + 1),
            batch_size=experiment.batch_size,
            drop_last=experiment.drop_last,
            statistics=experiment.bn_statistics,
        )
        count = len(train.labels)
        with display.EpochLines(console, experiment, done, execution.progress, count) as shown:
            for epoch in epochs:
                steps, on_train, on_test = processes.gather((epoch.steps, epoch.train, epoch.test))
                epoch = epoch._replace(steps=steps, train=on_train, test=on_test)
                lines = metric_lines(epoch)
                if processes.is_first():
                    metrics.append(plan.path, lines)
                what = f"what happens inside after epoch {epoch.number} could not be recorded"
                with exits.optional(console, what, "the report will be without it"):
                    seen = probes.after_epoch(plan.lanes, epoch.states, example, train)
                    if processes.is_first():
                        file = plan.path / "probes" / f"epoch-{epoch.number:03}.npz"
                        rundir.write_arrays(file, seen)
                shown.add(lines)

                found = divergences.find(epoch, marks)
                what = "the first layer that was not finite could not be found"
                with exits.optional(console, what, "epoch and step are known"):
                    before = partial(_states_before, epoch, checkpoints, create)
                    size = experiment.batch_size
                    divergences.locate(found, epoch, keys, train, test, size, before, shares)
                for mark in found:
                    display.print_plain(console, f"NOTE: {divergences.describe(mark)}")
                marks += found
                if found and processes.is_first():
                    divergences.write(plan.path, marks)
                checkpoints.save(epoch.number, epoch.states)
                states = epoch.states
                check()

        what = "what the networks have become could not be recorded"
        with exits.optional(console, what, f"{shlex.join(_how_to_go_on(plan.path))} tries again"):
            _look_inside(plan, states, train, test)
    status = processes.tell_all(_finish(plan.path, console) if processes.is_first() else None)[0]
    if execution.open and processes.is_first() and (plan.path / "report.html").exists():
        display.open_report(plan.path)
    return status


def _look_inside(plan: Plan, states: States, train: Batch, test: Batch) -> None:
    """Saves what a replicate that stayed finite has become, if there is one."""
    lines = metrics.read(plan.path) if processes.is_first() else []
    replicate = processes.tell_all(metrics.finite_to_the_end(lines) if lines else None)[0]
    if replicate is not None:
        seen = probes.at_end(plan.lanes, states, replicate, train, test)
        if processes.is_first():
            rundir.write_arrays(plan.path / "probes" / "end.npz", seen)


def _states_before(
    epoch: paired.Epoch, checkpoints: checkpoint.Checkpoints, create: Callable[[], States]
) -> States:
    return checkpoints.at(epoch.number - 1, epoch.states) if epoch.number > 1 else create()


def metric_lines(epoch: paired.Epoch) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` for one epoch."""
    values = {
        arm: {
            "train_cost": _divide(steps.loss, steps.examples).mean(axis=1),
            "train_loss": _divide(epoch.train[arm].loss, epoch.train[arm].examples),
            "train_accuracy": _divide(epoch.train[arm].correct, epoch.train[arm].examples),
            "test_loss": _divide(epoch.test[arm].loss, epoch.test[arm].examples),
            "test_accuracy": _divide(epoch.test[arm].correct, epoch.test[arm].examples),
        }
        for arm, steps in epoch.steps.items()
    }
    replicates = len(values[metrics.ARMS[0]]["train_cost"])
    return [
        {
            "epoch": epoch.number,
            "arm": arm,
            "replicate": replicate,
            **{name: float(column[replicate]) for name, column in values[arm].items()},
            "seconds": epoch.seconds,
        }
        for replicate in range(replicates)
        for arm in metrics.ARMS
    ]


def _finish(path: Path, console: Console) -> int:
    summary = None
    then = f"python -m experiments.report {shlex.quote(str(path))} tries again"
    with exits.optional(console, "the report could not be drawn", then):
        from experiments import report  # matplotlib takes a third of a second

        with display.noting(console, ReportWarning):
            summary = report.redraw(path, ended=True)
        display.print_plain(console, f"report: {path / 'report.html'}")
    if summary is None:
        lines, marks = metrics.read(path), divergences.read(path)
        if not lines:
            raise CheckpointError(f"{path} does not hold the run any more")
        summary = metrics.write_summary(path, lines, marks)
    console.print(display.closing_table(summary))
    diverged = [arm for arm in metrics.ARMS if summary["arms"][arm]["train_cost"]["n"] == 0]
    for arm in diverged:
        display.print_plain(Console(stderr=True), f"error: every replicate of {arm} has diverged")
    return exits.DIVERGED if diverged else 0


def _choose_example(test: Batch, digit: int) -> Batch:
    index = int(np.argmax(test.labels == digit))
    return Batch(test.images[index : index + 1], test.labels[index : index + 1])


def _divide(sums: jax.Array, counts: jax.Array) -> np.ndarray:
    return np.asarray(sums, np.float64) / np.asarray(counts, np.float64)


if __name__ == "__main__":
    exits.leave(main())

"""Trains networks that differ in their normalization on the same batches.

Presets, each the setting of a notebook; all their values are flags below:

    boostcourse   784-32-32-512, Adam 1e-3, batches of 100, 15 epochs
    lab10         784-32-32-10, Adam 1e-2, batches of 32, 11 epochs
    deep10        ten hidden layers of 64, Adam 1e-3, batches of 64, 9 epochs

Examples:

    python -m experiments.mnist_bn
    python -m experiments.mnist_bn --preset deep10 --replicates 5
    python -m experiments.mnist_bn --learning-rate 0.01 --hidden-sizes 64 64 64
    python -m experiments.mnist_bn --arms bn layer_norm "ghost_bn(25)" no_bn
    python -m experiments.mnist_bn --resume runs/DIR --epochs 30

It prints a line per epoch and leaves a run directory: the numbers
(metrics.jsonl, summary.json), the settings (config.json), pictures, and
report.html, which opens without a network.

Exit status: 0 success; 1 another process is lost; 2 a mistake in the command, the settings or the
data; 3 every replicate of one network diverged; 130 after Ctrl-C, 143 after SIGTERM.
"""

import contextlib
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from bnjax.parallel import processes
from experiments.lab import console as display
from experiments.lab import exits, loop, plan, rundir
from experiments.lab.plan import Plan
from experiments.lab.run import Run

PROG = "python -m experiments.mnist_bn"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    console = Console()
    path: Path | None = None

    def command(raise_if_stopped: Callable[[], None]) -> int:
        nonlocal path
        with contextlib.ExitStack() as stack:
            with exits.user_errors():
                made = plan.prepare(arguments, PROG, __doc__ or "", console)
                if made is None:
                    return 0
                processes.run_on_all(lambda: _claim(made, stack))
            path = made.path
            display.print_plain(console, f"run directory: {path}")
            if processes.count() > 1:  # JAX may end this process without another word
                again = shlex.join(loop.resume_command(path))
                display.print_plain(console, f"should a process be lost, go on with: {again}")
            loop.run(made, console, raise_if_stopped)
            first = processes.is_first()
            status = processes.allgather_object(_finish(path, console) if first else None)[0]
        if made.options.execution.open and first and (path / "report.html").exists():
            display.open_report(path)
        return status

    return exits.run(command, lambda: loop.resume_command(path) if path else [])


def _claim(made: Plan, stack: contextlib.ExitStack) -> None:
    """Makes the directory of a new run, and keeps it to this command."""
    if processes.is_first():
        if not made.options.execution.resume:
            rundir.create(made.path, made.config)
        stack.enter_context(rundir.locked(made.path))


def _finish(path: Path, console: Console) -> int:
    summary = None
    then = f"python -m experiments.report {shlex.quote(str(path))} tries again"
    with exits.optional(console, "the report could not be drawn", then):
        from experiments import report  # matplotlib takes a third of a second

        with display.show_warnings(console, rundir.ReportWarning):
            summary = report.redraw(path, ended=True)
        display.print_plain(console, f"report: {path / 'report.html'}")
    run = Run(path)  # which may have been removed
    if summary is None:
        summary = run.summarize()
        rundir.write_json(path / "summary.json", summary)
    console.print(display.closing_table(summary, run.titles))
    diverged = [arm for arm in run.arms if summary["arms"][arm]["train_cost"]["n"] == 0]
    for arm in diverged:
        display.print_plain(Console(stderr=True), f"error: every replicate of {arm} has diverged")
    return exits.DIVERGED if diverged else 0


if __name__ == "__main__":
    exits.leave(main())

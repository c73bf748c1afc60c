"""What a run shows while it trains: a line per epoch, and a progress bar on a terminal."""

import warnings
import webbrowser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from experiments.lab.metrics import ARMS, curves
from experiments.lab.presets import Experiment

TITLES = {"bn": "with batch normalization", "no_bn": "without"}
ONE_REPLICATE = "One replicate: no interval can be given; --replicates 8 would give one."
SHOWN = {"train_cost": "train cost", "test_loss": "test loss", "test_accuracy": "test acc."}


class EpochLines:
    """Prints the epochs of a run as they come; a context manager around training.

    On a terminal a bar below the lines shows both arms' latest test accuracy, how many images are
    trained on in a second, and the time left.
    """

    def __init__(
        self, console: Console, experiment: Experiment, done: int, bar: bool, examples: int
    ) -> None:
        self._console = console
        self._images = examples * experiment.replicates * len(ARMS)
        self._experiment = experiment
        self._progress = Progress(
            TextColumn("epoch {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TextColumn("time left"),
            TimeRemainingColumn(),
            console=console,
            disable=not (bar and console.is_terminal),
            transient=True,
        )
        self._task = self._progress.add_task("", total=experiment.epochs, completed=done)

    def __enter__(self) -> "EpochLines":
        replicates = self._experiment.replicates
        over = f" (means of {replicates} replicates)" if replicates > 1 else ""
        self._print(f"{'':8}{TITLES['bn']:<32}{TITLES['no_bn']}{over}")
        columns = "".join(f"{title:>10}" for title in SHOWN.values())
        self._print(f"{'epoch':<8}{columns}  {columns}   seconds")
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Shows one epoch, given its lines of `metrics.jsonl`."""
        epoch, seconds = lines[0]["epoch"], lines[0]["seconds"]
        by_arm = curves([{**line, "epoch": 1} for line in lines])
        means = {arm: [_mean(by_arm[arm][metric][-1]) for metric in SHOWN] for arm in ARMS}
        sides = "  ".join(
            f"{_ten_wide(cost)}{_ten_wide(loss)}{100 * accuracy:8.2f} %"
            for cost, loss, accuracy in means.values()
        )
        self._print(f"{f'{epoch}/{self._experiment.epochs}':<8}{sides}{seconds:10.2f}")
        accuracy = ", ".join(f"{arm} {100 * means[arm][-1]:.2f} %" for arm in ARMS)
        told = f"{accuracy}, {self._images / seconds:,.0f} images/s"
        self._progress.update(self._task, completed=epoch, description=told)

    def _print(self, line: str) -> None:
        print_plain(self._console, line)


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _ten_wide(value: float) -> str:
    return f"{_number(value, 4):>10}"


def print_plain(console: Console, line: str, style: str | None = None) -> None:
    """Prints a line as it is: not wrapped, not coloured by guesses, brackets and all."""
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def open_report(path: Path) -> None:
    """Shows the report of a run in the browser."""
    webbrowser.open((path / "report.html").absolute().as_uri())


@contextmanager
def noting(console: Console, category: type[Warning]) -> Iterator[None]:
    """Shows the warnings of a category that its body gives, each on a line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", category)
        yield
    for found in caught:
        if issubclass(found.category, category):
            print_plain(console, f"NOTE: {found.message}", style="bold yellow")
        else:
            warnings.warn_explicit(found.message, found.category, found.filename, found.lineno)


def closing_table(summary: Mapping[str, Any]) -> Group:
    """The final metrics of both arms and their paired difference, from `summary.json`."""
    several = summary["replicates"] > 1
    title = f"After {summary['epochs']} epoch{'s' * (summary['epochs'] > 1)}"
    if several:
        title += f", {summary['replicates']} replicates"
    final = _table(title, *TITLES.values(), *([] if several else ["difference"]))
    paired = _table("Difference, accuracies in points", "", "95 % interval", "BN wins", "p (sign)")
    for metric, difference in summary["paired_differences"].items():
        name = metric.replace("_", " ")
        arms = [format_summary(metric, summary["arms"][arm][metric]) for arm in ARMS]
        told = format_summary(metric, difference, difference=True)
        counts = [summary["arms"][arm][metric]["n"] for arm in ARMS]
        arms = [
            text if n == summary["replicates"] else f"{text} (n = {n})"
            for text, n in zip(arms, counts, strict=True)
        ]
        final.add_row(name, *arms, *([] if several else [told]))
        paired.add_row(name, told.removesuffix(" points"), *format_certainty(metric, difference))
    return Group(final, paired if several else ONE_REPLICATE)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def format_summary(metric: str, summary: Mapping[str, Any], difference: bool = False) -> str:
    """`mean ± sd` of a metric or of its difference; accuracies in percent and in points."""
    if summary["mean"] is None:
        return "not finite"
    scale, digits, unit = _unit(metric, difference)
    text = _number(scale * summary["mean"], digits, "+" if difference else "")
    if summary["sd"] is not None:
        text += f" ± {_number(scale * summary['sd'], digits)}"
    return text + unit


def format_certainty(metric: str, difference: Mapping[str, Any]) -> tuple[str, str, str]:
    """The interval, how many replicates favour BN, and the sign test, of a paired difference."""
    scale, digits, _ = _unit(metric, difference=True)
    interval, sign_test = "-", "-"
    if difference["interval"] is not None:
        low, high = (_number(scale * bound, digits, "+") for bound in difference["interval"])
        interval = f"{low} to {high}"
    if difference["sign_test"] is not None and difference["n"] > 1:
        sign_test = f"{difference['sign_test']:.2g}"
    return interval, f"{difference['favour']} of {difference['n']}", sign_test


def _number(value: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}" if abs(value) < 1000 else f"{value:{sign}.3g}"


def _unit(metric: str, difference: bool) -> tuple[int, int, str]:
    if metric.endswith("accuracy"):
        return 100, 2, " points" if difference else " %"
    return 1, 4, ""

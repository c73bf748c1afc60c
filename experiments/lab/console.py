"""What a run shows while it trains: a line per epoch, and a progress bar on a terminal."""

import warnings
import webbrowser
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from rich import table
from rich.box import SIMPLE
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.lab import metrics
from experiments.lab.presets import Experiment

ONE_REPLICATE = "One replicate: no interval can be given; --replicates 8 would give one."
NAMES = {metric: metric.replace("_", " ") for metric in metrics.METRICS}
SHOWN = {"train_cost": "train cost", "test_loss": "test loss", "test_accuracy": "test acc."}


class EpochLines:
    """Prints the epochs of a run as they come; a context manager around training.

    Of more than two arms only the test accuracy, so that eight of them fit into 120 columns. On a
    terminal a bar below the lines shows the latest test accuracy, of both arms or of the best, how
    many images are trained on in a second, and the time left.
    """

    def __init__(
        self,
        console: Console,
        titles: Mapping[str, str],
        experiment: Experiment,
        done: int,
        bar: bool,
        examples: int,
    ) -> None:
        self._console = console
        self._arms, few = list(titles), len(titles) < 3
        self._heads = list(titles.values()) if few else self._arms
        self._shown = SHOWN if few else {"test_accuracy": SHOWN["test_accuracy"]}
        self._width = 32 if few else max(12, min(15, 100 // len(titles)))
        self._images = examples * experiment.replicates * len(titles)
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
        heads = self._line(_cut(head, self._width - 1) for head in self._heads)
        self._print(f"{'':8}{heads.rstrip()}{over}")
        columns = "".join(f"{title:>10}" for title in self._shown.values())
        self._print(f"{'epoch':<8}{self._line(columns for _ in self._arms)} seconds")
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
        means = {
            arm: {metric: _mean(of_arm[metric][-1]) for metric in self._shown}
            for arm, of_arm in metrics.curves(lines, self._arms).items()
        }
        told = self._line(
            "".join(_ten_wide(*one) for one in of_arm.items()) for of_arm in means.values()
        )
        self._print(f"{f'{epoch}/{self._experiment.epochs}':<8}{told}{seconds:8.2f}")
        accuracies = {arm: 100 * of_arm["test_accuracy"] for arm, of_arm in means.items()}
        latest = ", ".join(f"{arm} {value:.2f} %" for arm, value in accuracies.items())
        if len(accuracies) > 2:
            best = max(accuracies, key=lambda arm: np.nan_to_num(accuracies[arm], nan=-1))
            latest = f"best {best} {accuracies[best]:.2f} %"
        told = f"{latest}, {self._images / seconds:,.0f} images/s"
        self._progress.update(self._task, completed=epoch, description=told)

    def _line(self, parts: Iterable[str]) -> str:
        return "".join(f"{part:<{self._width}}" for part in parts)

    def _print(self, line: str) -> None:
        print_plain(self._console, line)


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _ten_wide(metric: str, value: float) -> str:
    return f"{100 * value:8.2f} %" if metric.endswith("accuracy") else f"{_number(value, 4):>10}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def print_plain(console: Console, line: str, style: str | None = None) -> None:
    """Prints a line as it is: not wrapped, not coloured by guesses, brackets and all."""
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def open_report(path: Path) -> None:
    """Shows the report of a run in the browser."""
    webbrowser.open((path / "report.html").absolute().as_uri())


@contextmanager
def show_warnings(console: Console, category: type[Warning]) -> Iterator[None]:
    """Shows the warnings of a category that its body gives, each on a line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", category)
        yield
    for found in caught:
        if issubclass(found.category, category):
            print_plain(console, f"NOTE: {found.message}", style="bold yellow")
        else:
            warnings.warn_explicit(found.message, found.category, found.filename, found.lineno)


def closing_table(summary: Mapping[str, Any], titles: Mapping[str, str]) -> Group:
    """The final metrics of all arms and how they differ, from `summary.json`.

    More than two arms are told by their names, and differ in test accuracy: 80 columns hold that.
    """
    found = tables(summary, titles)
    if len(titles) > 2:
        names = {arm: arm for arm in titles}
        final, (_, headings, rows) = tables(summary, names, SHOWN)
        title = f"Difference from {summary['reference']} in points of test accuracy"
        rows = [
            (arm, told.removesuffix(" points"), *sure)
            for arm, name, told, *sure in rows
            if name == SHOWN["test_accuracy"]
        ]
        found = [final, Table(title, ["arm", *headings[2:]], rows)]
    drawn = []
    for title, headings, rows in found:
        shown = table.Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
        for heading in headings:
            shown.add_column(heading, justify="right" if shown.columns else "left")
        for row in rows:
            shown.add_row(*row)
        drawn.append(shown)
    return Group(*drawn, *([ONE_REPLICATE] if summary["replicates"] == 1 else []))


class Table(NamedTuple):
    """A table of text; the first column says what a row is of."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(
    summary: Mapping[str, Any],
    titles: Mapping[str, str],
    shown: Mapping[str, str] = NAMES,
    *,
    wide: bool = False,
) -> list[Table]:
    """The final metrics of all arms, and each arm minus the reference.

    Args:
        summary: of a run.
        titles: `{arm: title}`. One or two arms are columns, more are rows.
        shown: `{metric: name}`.
        wide: join both tables of two arms, as is always done for one replicate.
    """
    replicates = summary["replicates"]
    title = f"After {summary['epochs']} epoch{'s' * (summary['epochs'] > 1)}"
    title += f", {replicates} replicates" * (replicates > 1)
    headings = ["difference", "95 % interval", "wins", "p (sign test)"]
    headings = headings if replicates > 1 else headings[:1]
    finals = [
        [format_final(metric, summary["arms"][arm][metric], replicates) for metric in shown]
        for arm in titles
    ]
    minus = [
        (
            titles[arm],
            name,
            format_summary(metric, of_arm[metric], difference=True),
            *format_certainty(metric, of_arm[metric]),
        )[: 2 + len(headings)]
        for arm, of_arm in summary["differences"].items()
        for metric, name in shown.items()
    ]
    if len(titles) > 2:
        rows = [[title, *row] for title, row in zip(titles.values(), finals, strict=True)]
        against = f"Difference from the reference: {titles[summary['reference']]}"
        return [
            Table(title, ["arm", *shown.values()], rows),
            Table(against, ["arm", "metric", *headings], minus),
        ]
    final = Table(
        title, ["metric", *titles.values()], list(zip(shown.values(), *finals, strict=True))
    )
    if not minus:
        return [final]
    if wide or replicates == 1:
        joined = [(*row, *more[2:]) for row, more in zip(final.rows, minus, strict=True)]
        return [Table(title, [*final.headings, *headings], joined)]
    return [final, Table("Difference", ["metric", *headings], [row[1:] for row in minus])]


def format_final(metric: str, summary: Mapping[str, Any], replicates: int) -> str:
    """As `format_summary`, with the number of replicates that stayed finite where not all did."""
    told = f" (n = {summary['n']})" * (summary["n"] != replicates)
    return format_summary(metric, summary) + told


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
    """The interval, how many replicates the first arm wins, and the sign test, of a difference."""
    scale, digits, _ = _unit(metric, difference=True)
    interval, p = "-", "-"
    if difference["interval"] is not None:
        low, high = (_number(scale * bound, digits, "+") for bound in difference["interval"])
        interval = f"{low} to {high}"
    if difference["p"] is not None and difference["n"] > 1:
        p = f"{difference['p']:.2g}"
    return interval, f"{difference['wins']} of {difference['n']}", p


def _number(value: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}" if abs(value) < 1000 else f"{value:{sign}.3g}"


def _unit(metric: str, difference: bool) -> tuple[int, int, str]:
    if metric.endswith("accuracy"):
        return 100, 2, " points" if difference else " %"
    return 1, 4, ""

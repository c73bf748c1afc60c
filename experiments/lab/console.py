"""What commands show: lines, warnings, and the numbers of a summary as text and tables."""

import warnings
import webbrowser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich import table
from rich.box import SIMPLE
from rich.console import Console, Group

ONE_REPLICATE = "One replicate: no interval can be given; --replicates 8 would give one."
SHOWN = {"train_cost": "train cost", "test_loss": "test loss", "test_accuracy": "test acc."}


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
    shown: Mapping[str, str] | None = None,
    *,
    wide: bool = False,
) -> list[Table]:
    """The final metrics of all arms, and each arm minus the reference.

    Args:
        summary: of a run.
        titles: `{arm: title}`. One or two arms are columns, more are rows.
        shown: `{metric: name}`, by default all of them.
        wide: join both tables of two arms, as is always done for one replicate.
    """
    replicates = summary["replicates"]
    metrics = summary["arms"][summary["reference"]]
    shown = shown or {metric: metric.replace("_", " ") for metric in metrics}
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
    text = format_number(scale * summary["mean"], digits, "+" if difference else "")
    if summary["sd"] is not None:
        text += f" ± {format_number(scale * summary['sd'], digits)}"
    return text + unit


def format_certainty(metric: str, difference: Mapping[str, Any]) -> tuple[str, str, str]:
    """The interval, how many replicates the first arm wins, and the sign test, of a difference."""
    scale, digits, _ = _unit(metric, difference=True)
    interval, p = "-", "-"
    if difference["interval"] is not None:
        low, high = (format_number(scale * x, digits, "+") for x in difference["interval"])
        interval = f"{low} to {high}"
    if difference["p"] is not None and difference["n"] > 1:
        p = f"{difference['p']:.2g}"
    return interval, f"{difference['wins']} of {difference['n']}", p


def format_number(value: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}" if abs(value) < 1000 else f"{value:{sign}.3g}"


def _unit(metric: str, difference: bool) -> tuple[int, int, str]:
    if metric.endswith("accuracy"):
        return 100, 2, " points" if difference else " %"
    return 1, 4, ""

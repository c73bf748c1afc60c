"""What commands show: lines, warnings, and the numbers of a summary as text and tables."""

import warnings
import webbrowser
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.table import Table

ONE_REPLICATE = "One replicate: no interval can be given; --replicates 8 would give one."
Column = tuple[str, Iterable[str]]  # its heading, and its cells
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

    One or two arms are columns. More are rows, told by their names, and differ in test accuracy:
    80 columns hold that.
    """
    few, replicates, reference = len(titles) < 3, summary["replicates"], summary["reference"]
    shown = {m: m.replace("_", " ") for m in summary["arms"][reference]} if few else SHOWN
    finals = [
        [format_final(metric, of_arm[metric], replicates) for metric in shown]
        for of_arm in summary["arms"].values()
    ]
    differences = [
        [
            format_summary(metric, of_arm[metric], True).removesuffix("" if few else " points"),
            *format_certainty(metric, of_arm[metric]),
        ]
        for of_arm in summary["differences"].values()
        for metric in (shown if few else ["test_accuracy"])
    ]
    headings = ["difference", *["95 % interval", "wins", "p (sign test)"] * (replicates > 1)]
    compared: list[Column] = [*zip(headings, zip(*differences, strict=True), strict=False)]
    title = f"After {summary['epochs']} epoch{'s' * (summary['epochs'] > 1)}"
    title += f", {replicates} replicates" * (replicates > 1)
    if few:
        against, names = "Difference", ("metric", shown.values())
        columns: list[Column] = [names, *zip(titles.values(), finals, strict=True)]
        if replicates == 1:
            columns, compared = columns + compared, []
    else:
        against = f"Difference from {reference} in points of test accuracy"
        names, values = ("arm", summary["differences"]), zip(*finals, strict=True)
        columns = [("arm", titles), *zip(shown.values(), values, strict=True)]
    tables = [_table(title, columns)]
    if compared:
        tables.append(_table(against, [names, *compared]))
    return Group(*tables, *[ONE_REPLICATE] * (replicates == 1))


def _table(title: str, columns: Sequence[Column]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for heading, _ in columns:
        table.add_column(heading, justify="right" if table.columns else "left")
    for row in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*row)
    return table


def format_final(metric: str, summary: Mapping[str, Any], replicates: int) -> str:
    """As `format_summary`, with the number of replicates that stayed finite where not all did."""
    told = f" (n = {summary['n']})" * (summary["n"] != replicates)
    return format_summary(metric, summary) + told


def format_summary(metric: str, summary: Mapping[str, Any], difference: bool = False) -> str:
    """`mean ± sd` of a metric or of its difference; accuracies in percent and in points."""
    if summary["mean"] is None:
        return "not finite"
    text = format_number(metric, summary["mean"], "+" if difference else "")
    if summary["sd"] is not None:
        text += f" ± {format_number(metric, summary['sd'])}"
    unit = " points" if difference else " %"
    return text + unit * metric.endswith("accuracy")


def format_certainty(metric: str, difference: Mapping[str, Any]) -> tuple[str, str, str]:
    """The interval, how many replicates the first arm wins, and the sign test, of a difference."""
    interval, p = "-", "-"
    if difference["interval"] is not None:
        interval = " to ".join(format_number(metric, x, "+") for x in difference["interval"])
    if difference["p"] is not None and difference["n"] > 1:
        p = f"{difference['p']:.2g}"
    return interval, f"{difference['wins']} of {difference['n']}", p


def format_number(metric: str, value: float, sign: str = "") -> str:
    """A value of a metric, without its unit; accuracies in percent."""
    value, digits = (100 * value, 2) if metric.endswith("accuracy") else (value, 4)
    return f"{value:{sign}.{digits}f}" if abs(value) < 1000 else f"{value:{sign}.3g}"

"""What a run shows while it trains: a line per epoch, and a progress bar on a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bnjax.statistics import summarize
from experiments.presets import Experiment
from experiments.runs import ARMS

TITLES = {"bn": "with batch normalization", "no_bn": "without"}
SHOWN = {"train_cost": "train cost", "test_loss": "test loss", "test_accuracy": "test acc."}


class EpochLines:
    """Prints the epochs of a run as they come; a context manager around training.

    On a terminal a bar below the lines shows both arms' latest test accuracy and the time left.
    """

    def __init__(self, console: Console, experiment: Experiment, done: int, bar: bool) -> None:
        self._console = console
        self._experiment = experiment
        self._done = done
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
        means = {
            arm: [_mean(line[metric] for line in lines if line["arm"] == arm) for metric in SHOWN]
            for arm in ARMS
        }
        sides = "  ".join(
            f"{_ten_wide(cost)}{_ten_wide(loss)}{100 * accuracy:8.2f} %"
            for cost, loss, accuracy in means.values()
        )
        self._print(f"{f'{epoch}/{self._experiment.epochs}':<8}{sides}{seconds:10.2f}")
        accuracy = ", ".join(f"{arm} {100 * means[arm][-1]:.2f} %" for arm in ARMS)
        self._progress.update(self._task, completed=epoch, description=accuracy)

    def _print(self, line: str) -> None:
        print_plain(self._console, line)


def _mean(values: Iterable[float]) -> float:
    mean = summarize(list(values)).mean
    return float("nan") if mean is None else mean


def _ten_wide(value: float) -> str:
    return f"{value:10.4f}" if abs(value) < 1000 else f"{value:10.3g}"


def print_plain(console: Console, line: str, style: str | None = None) -> None:
    """Prints a line as it is: not wrapped, not coloured by guesses, brackets and all."""
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def closing_table(summary: Mapping[str, Any]) -> Table:
    """The final metrics of both arms and their difference, from `summary.json`."""
    replicates = summary["replicates"]
    title = f"After {summary['epochs']} epoch{'s' * (summary['epochs'] > 1)}"
    table = Table(title=title if replicates == 1 else f"{title}, {replicates} replicates")
    table.add_column("")
    for heading in (*(TITLES[arm] for arm in ARMS), "difference"):
        table.add_column(heading, justify="right")
    for metric in summary["paired_differences"]:
        cells = [summary["arms"][arm][metric] for arm in ARMS]
        difference = summary["paired_differences"][metric]
        table.add_row(
            metric.replace("_", " "),
            *(format_summary(metric, cell) for cell in cells),
            format_summary(metric, difference, difference=True),
        )
    return table


def format_summary(metric: str, summary: Mapping[str, Any], difference: bool = False) -> str:
    """`mean ± sd` of a metric or of its difference; accuracies in percent and in points."""
    if summary["mean"] is None:
        return "not finite"
    scale, digits, unit = 1, 4, ""
    if metric.endswith("accuracy"):
        scale, digits, unit = 100, 2, " points" if difference else " %"
    text = f"{scale * summary['mean']:{'+' if difference else ''}.{digits}f}"
    if summary["sd"] is not None:
        text += f" ± {scale * summary['sd']:.{digits}f}"
    return text + unit

"""What a run shows while it trains: a line per epoch, and a progress bar on a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.lab import metrics
from experiments.lab.console import SHOWN, format_number, print_plain
from experiments.lab.presets import Experiment


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
    return (
        f"{100 * value:8.2f} %" if metric.endswith("accuracy") else f"{format_number(value, 4):>10}"
    )


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"

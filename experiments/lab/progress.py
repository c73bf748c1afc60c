"""What a run shows while it trains: a line per epoch, and a progress bar on a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.lab import metrics
from experiments.lab.console import SHOWN, format_summary, print_plain
from experiments.lab.presets import Experiment

ACCURACY = "test_accuracy"


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
        few = len(titles) < 3
        self._print = partial(print_plain, console)
        self._heads = {arm: title if few else arm for arm, title in titles.items()}
        self._shown = SHOWN if few else {ACCURACY: SHOWN[ACCURACY]}
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
        replicates, most = self._experiment.replicates, self._width - 1
        over = f" (means of {replicates} replicates)" if replicates > 1 else ""
        heads = [
            head if len(head) <= most else f"{head[: most - 1]}…" for head in self._heads.values()
        ]
        self._print(f"{'':8}{self._line(heads).rstrip()}{over}")
        columns = "".join(f"{title:>10}" for title in self._shown.values())
        self._print(f"{'epoch':<8}{self._line([columns] * len(heads))} seconds")
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Shows one epoch, given its lines of `metrics.jsonl`."""
        epoch, seconds = lines[0]["epoch"], lines[0]["seconds"]
        means = {
            arm: {metric: _mean(of_arm[metric][-1]) for metric in self._shown}
            for arm, of_arm in metrics.curves(lines, list(self._heads)).items()
        }
        told = self._line(
            "".join(f"{_tell(metric, mean):>10}" for metric, mean in of_arm.items())
            for of_arm in means.values()
        )
        self._print(f"{f'{epoch}/{self._experiment.epochs}':<8}{told}{seconds:8.2f}")
        latest = [f"{arm} {_tell(ACCURACY, of_arm[ACCURACY])}" for arm, of_arm in means.items()]
        if len(means) > 2:
            best = np.argmax([np.nan_to_num(of_arm[ACCURACY], nan=-1) for of_arm in means.values()])
            latest = [f"best {latest[best]}"]
        told = f"{', '.join(latest)}, {self._images / seconds:,.0f} images/s"
        self._progress.update(self._task, completed=epoch, description=told)

    def _line(self, parts: Iterable[str]) -> str:
        return "".join(f"{part:<{self._width}}" for part in parts)


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _tell(metric: str, value: float) -> str:
    return format_summary(metric, {"mean": value, "sd": None})

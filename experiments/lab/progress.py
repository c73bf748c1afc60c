"""What a run shows while it trains: a line per epoch, and a progress bar on a terminal."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.lab import metrics
from experiments.lab.console import SHOWN, format_summary, print_plain
from experiments.lab.presets import Experiment

ACCURACY = "test_accuracy"


@contextmanager
def epoch_lines(
    console: Console,
    titles: Mapping[str, str],
    experiment: Experiment,
    done: int,
    bar: bool,
    examples: int,
) -> Iterator[Callable[[Sequence[Mapping[str, Any]]], None]]:
    """Gives what prints an epoch, called with its lines of `metrics.jsonl`.

    Of more than two arms only the test accuracy, so that eight of them fit into 120 columns. On a
    terminal a bar below the lines shows the latest test accuracy, of both arms or of the best, how
    many images are trained on in a second, and the time left.
    """
    replicates, few = experiment.replicates, len(titles) < 3
    shown = SHOWN if few else {ACCURACY: SHOWN[ACCURACY]}
    width = 32 if few else max(12, min(15, 100 // len(titles)))

    def line(parts: Iterable[str]) -> str:
        return "".join(f"{part:<{width}}" for part in parts)

    def show(lines: Sequence[Mapping[str, Any]]) -> None:
        epoch, seconds = lines[0]["epoch"], lines[0]["seconds"]
        means = {
            arm: {metric: _mean(of_arm[metric][-1]) for metric in shown}
            for arm, of_arm in metrics.curves(lines, list(titles)).items()
        }
        told = line(
            "".join(f"{_format(metric, mean):>10}" for metric, mean in of_arm.items())
            for of_arm in means.values()
        )
        print_plain(console, f"{f'{epoch}/{experiment.epochs}':<8}{told}{seconds:8.2f}")
        latest = {arm: of_arm[ACCURACY] for arm, of_arm in means.items()}
        best = max(latest, key=lambda arm: np.nan_to_num(latest[arm], nan=-1))
        shown_on_bar = [f"{arm} {_format(ACCURACY, latest[arm])}" for arm in latest]
        told = ", ".join(shown_on_bar) if few else f"best {best} {_format(ACCURACY, latest[best])}"
        speed = examples * replicates * len(titles) / seconds
        progress.update(task, completed=epoch, description=f"{told}, {speed:,.0f} images/s")

    names = titles.values() if few else titles
    heads = line(name if len(name) < width else f"{name[: width - 2]}…" for name in names).rstrip()
    over = f" (means of {replicates} replicates)" if replicates > 1 else ""
    print_plain(console, f"{'':8}{heads}{over}")
    columns = line(["".join(f"{title:>10}" for title in shown.values())] * len(titles))
    print_plain(console, f"{'epoch':<8}{columns} seconds")
    with Progress(
        TextColumn("epoch {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("{task.description}"),
        TextColumn("time left"),
        TimeRemainingColumn(),
        console=console,
        disable=not (bar and console.is_terminal),
        transient=True,
    ) as progress:
        task = progress.add_task("", total=experiment.epochs, completed=done)
        yield show


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else np.nan


def _format(metric: str, mean: float) -> str:
    return format_summary(metric, {"mean": mean, "sd": None})

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
            arm: {metric: _summarize(of_arm[metric][-1]) for metric in shown}
            for arm, of_arm in metrics.curves(lines, list(titles)).items()
        }
        told = line(
            "".join(f"{format_summary(metric, mean):>10}" for metric, mean in of_arm.items())
            for of_arm in means.values()
        )
        print_plain(console, f"{f'{epoch}/{experiment.epochs}':<8}{told}{seconds:8.2f}")
        accuracies = {arm: of_arm[ACCURACY] for arm, of_arm in means.items()}
        latest = [f"{arm} {format_summary(ACCURACY, one)}" for arm, one in accuracies.items()]
        if not few:
            best = np.argmax([np.nan_to_num(one["mean"], nan=-1) for one in accuracies.values()])
            latest = [f"best {latest[best]}"]
        images = examples * replicates * len(titles) / seconds
        told = f"{', '.join(latest)}, {images:,.0f} images/s"
        progress.update(task, completed=epoch, description=told)

    heads = line(_cut(title if few else arm, width - 1) for arm, title in titles.items()).rstrip()
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


def _summarize(values: np.ndarray) -> dict[str, Any]:
    finite = values[np.isfinite(values)]
    return {"mean": float(finite.mean()) if len(finite) else float("nan"), "sd": None}


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"

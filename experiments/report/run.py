"""The page of a run, drawn from its files alone."""

import shlex
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bnjax.errors import CheckpointError, shorten
from experiments.lab import divergences, metrics, options, probes, rundir
from experiments.lab.console import ONE_REPLICATE, TITLES, format_certainty, format_summary
from experiments.lab.presets import Experiment
from experiments.report import figures, layers, predictions, words
from experiments.report.figures import Probes, read_arrays
from experiments.report.page import Picture, png_uri, render, svg_uri

T = TypeVar("T")


class Parts:
    """The parts of a report, each of which may be missing without costing the others.

    Attributes:
        missing: which, why, and what to do.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.missing: list[str] = []

    def read(self, name: str) -> Probes | None:
        """A file of `probes`; None where it was not recorded."""
        file = self._path / "probes" / f"{name}.npz"
        if file.exists():
            return read_arrays(file)
        resume = f"python -m experiments.mnist_bn --resume {shlex.quote(str(self._path))}"
        again = f": {resume} records it" * (name == "end")
        self.missing.append(f"what probes/{file.name} would show, which is not there{again}")
        return None

    def make(self, what: str, draw: Callable[[], T]) -> T | None:
        """What `draw` returns, or None where it fails; damaged files are an error."""
        try:
            return draw()
        except CheckpointError:
            raise
        except Exception as error:
            again = f"python -m experiments.report {shlex.quote(str(self._path))} tries again"
            self.missing.append(f"{what} ({shorten(error)}): {again}")
            return None


def redraw(path: Path, *, ended: bool = False) -> dict[str, Any]:
    """Writes `summary.json`, the pictures and `report.html` of a run that has ended.

    A part that cannot be drawn or was not recorded costs a `ReportWarning` and a line on the page.

    Args:
        path: a run directory with `config.json`, `metrics.jsonl` and `probes`.
        ended: known to have ended, whatever could not be recorded at the end.

    Returns:
        The summary.

    Raises:
        ValueError: if the run has not ended, or files are damaged.
    """
    config = rundir.read_config(path)
    experiment = Experiment.load(config["experiment"])
    lines = metrics.read(path)
    expected = experiment.epochs * experiment.replicates * len(metrics.ARMS)
    ended = ended or rundir.is_finished(path, experiment.epochs) or not probes.end_is_missing(path)
    if len(lines) != expected or not ended:
        raise ValueError(
            f"{path} has not ended: go on with python -m experiments.mnist_bn --resume {path}, "
            f"which draws its report after {experiment.epochs} epochs"
        )
    replicate = metrics.finite_to_the_end(lines)
    marks = divergences.read(path)
    summary = {**metrics.summarize(lines), "divergences": marks}
    parts = Parts(path)
    inside = {} if replicate is None else look_inside(path, experiment, replicate, parts)

    def draw_curves() -> tuple[bytes, bytes]:
        drawn = figures.curves(metrics.curves(lines))
        return figures.to_png(drawn), figures.to_svg(drawn)

    curves = parts.make("the curves", draw_curves)
    if curves:
        rundir.write_bytes(path / "curves.png", curves[0])
        rundir.write_bytes(path / "curves.svg", curves[1])
    html = render(
        "page.html.j2",
        arms=metrics.ARMS,
        certainty=format_certainty,
        command=options.repeat(config),
        config=config,
        curves=curves and svg_uri(curves[1]),
        divergences=[divergences.describe(mark) for mark in marks],
        experiment=experiment,
        format=format_summary,
        headline=words.headline(summary),
        losses=words.losses(summary),
        inside=inside,
        labels=metrics.LABELS,
        missing=parts.missing,
        one_replicate=ONE_REPLICATE,
        seconds=float(np.median([line["seconds"] for line in lines])),
        summary=summary,
        titles=TITLES,
    )
    rundir.write_bytes(path / "report.html", html.encode(errors="replace"))
    for part in parts.missing:
        warnings.warn(f"the report lacks {part}", rundir.ReportWarning, stacklevel=2)
    rundir.write_json(path / "summary.json", summary)
    return summary


def look_inside(path: Path, experiment: Experiment, replicate: int, parts: Parts) -> dict[str, Any]:
    """What the page shows of a replicate that was finite to the end; writes `features.png`."""
    example, end = parts.read("example"), parts.read("end")
    found = [parts.read(f"epoch-{k:03}") for k in range(1, experiment.epochs + 1)]
    epochs = [probes for probes in found if probes]
    first, last = found[0], found[-1]
    pictures: list[Picture | None] = []
    if example and last:
        label, image = int(example["label"]), example["image"]

        def draw_features() -> tuple[bytes, Picture]:
            png = figures.to_png(figures.features(image, label, last, replicate))
            return png, Picture(
                "One digit through the layers",
                png_uri(png),
                words.features(label, last, replicate),
                "What leaves each hidden layer after the last epoch, each layer on its own scale. "
                "Blue cells are padding.",
                dark=False,
            )

        if drawn := parts.make("the digit through the layers", draw_features):
            rundir.write_bytes(path / "features.png", drawn[0])
            pictures.append(drawn[1])
    draw: dict[str, Callable[[], Picture]] = {}
    if len(epochs) == len(found):
        draw["the activations over the epochs"] = partial(draw_percentiles, epochs, replicate)
    if first and last:
        draw["the histograms of the activations"] = partial(draw_histograms, first, last, replicate)
        several = experiment.replicates > 1
        draw["the gradients"] = partial(draw_gradients, first, last, several)
    if end:
        draw["the running statistics"] = partial(draw_statistics, end)
    pictures += [parts.make(what, drawing) for what, drawing in draw.items()]
    return {
        "replicate": replicate,
        "pictures": [picture for picture in pictures if picture],
        "predictions": parts.make("the predictions", partial(tabulate, end)) if end else None,
    }


def tabulate(end: Probes) -> dict[str, Any]:
    """What both networks say of the test set."""
    confusions = predictions.confusions(end)
    return {
        "classes": predictions.classes(confusions),
        "confusions": confusions,
        "mistakes": words.mistakes(confusions),
        "most_mistakes": max(1, *(predictions.off_diagonal(c).max() for c in confusions.values())),
        "disagreements": predictions.disagreements(end),
    }


def draw_percentiles(epochs: Sequence[Probes], replicate: int) -> Picture:
    """The picture of what enters the activations, over the epochs."""
    told = words.activations(epochs[-1], replicate)
    return Picture(
        "What enters the activations, over the epochs",
        svg_uri(figures.to_svg(layers.percentiles(epochs, replicate))),
        "Percentiles of the values that enter the activations, by layer and epoch, with batch "
        f"normalization above and without below. {told}",
        "Line: the median. Dark band: the middle half; light band: nine tenths of all values, "
        "of a fixed sample of training examples with running statistics. Batch normalization "
        "brings them to mean 0 and deviation 1, then scales and shifts them by what it has "
        f"learned. {told}{_tell_choice(epochs[-1]['bn/percentiles'].shape[1])}",
    )


def draw_histograms(first: Probes, last: Probes, replicate: int) -> Picture:
    """The picture of what enters the activations after the first epoch and after the last."""
    told = words.activations(last, replicate)
    return Picture(
        "What enters the activations, first and last epoch",
        svg_uri(figures.to_svg(layers.histograms(first, last, replicate))),
        f"Histograms of the same values after the first and the last epoch. {told}",
        "Dotted after the first epoch, solid after the last."
        + _tell_choice(last["bn/percentiles"].shape[1]),
    )


def draw_gradients(first: Probes, last: Probes, several: bool) -> Picture:
    """The picture of the norms of gradients; bands are drawn where there are several replicates."""
    bands = " Bands are 95 % intervals, cut where they would leave the picture." * several
    told = words.gradients(last)
    return Picture(
        "How strong the gradients are",
        svg_uri(figures.to_svg(layers.gradient_norms(first, last))),
        f"Norms of the gradients by layer. {told}",
        "Norm of the gradient of the sample's loss in each kernel, in training mode. A steep "
        "line means that some layers learn from much stronger gradients than others. "
        f"{told}{bands}",
    )


def draw_statistics(end: Probes) -> Picture:
    """The picture of running statistics against those of the training set."""
    told = words.statistics(end)
    return Picture(
        "Running statistics and those of the training set",
        svg_uri(figures.to_svg(layers.statistics(end))),
        f"Running statistics against those of the training set. {told}",
        "One dot for each unit of the network with batch normalization. On the line the "
        "running average, by which evaluation normalizes, is what it estimates: the statistic "
        "of the training set under the final weights, here over chunks of some thousand examples. "
        f"{told}{_tell_choice(len(layers.batch_norms(end)))}",
    )


def _tell_choice(depth: int) -> str:
    shown = [layer + 1 for layer in layers.choose_layers(depth)]
    return f" Of {depth} layers {', '.join(map(str, shown))} are drawn." * (len(shown) < depth)

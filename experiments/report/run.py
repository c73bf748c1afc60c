"""The page of a run, drawn from its files alone."""

import shlex
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from matplotlib.figure import Figure

from bnjax.errors import CheckpointError, shorten
from experiments.lab import console, divergences, metrics, options, presets, rundir
from experiments.lab.run import Run
from experiments.report import figures, layers, predictions, words
from experiments.report.figures import Probes
from experiments.report.page import Picture, png_uri, render, svg_uri

T = TypeVar("T")


class Parts:
    """The parts of a report, each of which may be missing without costing the others.

    Attributes:
        missing: which, why, and what to do.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._path = run, shlex.quote(str(run.path))
        self.missing: list[str] = []

    def read(self, name: str) -> Probes | None:
        """A file of `probes`; None where it was not recorded."""
        found = self._run.probes(name)
        if found is None:
            again = f": python -m experiments.mnist_bn --resume {self._path} records it"
            what = f"what probes/{name}.npz would show, which is not there"
            self.missing.append(what + again * (name == "end"))
        return found

    def make(self, what: str, draw: Callable[[], T]) -> T | None:
        """What `draw` returns, or None where it fails; damaged files are an error."""
        try:
            return draw()
        except (CheckpointError, rundir.WriteError):
            raise
        except Exception as error:
            again = f"python -m experiments.report {self._path} tries again"
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
    run = Run(path)
    path, experiment = run.path, run.experiment
    replicate = metrics.finite_to_the_end(run.metrics) if run.epochs else None
    ended = ended or rundir.is_finished(path, experiment.epochs) or not run.lacks_end
    whole = experiment.epochs * experiment.replicates * len(run.arms)
    if len(run.lines) != whole or not ended:
        raise ValueError(
            f"{path} has not ended: go on with python -m experiments.mnist_bn --resume {path}, "
            f"which draws its report after {experiment.epochs} epochs"
        )
    marks = divergences.read(path)
    summary = {**metrics.summarize(run.metrics, run.reference), "divergences": marks}
    parts = Parts(run)
    short = words.phrases(run.labels, run.titles)
    inside = {} if replicate is None else look_inside(run, replicate, parts, short)

    def draw_curves() -> tuple[bytes, bytes]:
        drawn = figures.curves(run.metrics, figures.shorten_all(run.labels))
        return figures.to_png(drawn), figures.to_svg(drawn)

    curves = parts.make("the curves", draw_curves)
    if curves:
        rundir.write_bytes(path / "curves.png", curves[0])
        rundir.write_bytes(path / "curves.svg", curves[1])
    html = render(
        "page.html.j2",
        command=options.repeat(run.config),
        config=run.config,
        curves=curves and svg_uri(curves[1]),
        divergences=[divergences.describe(mark, run.labels) for mark in marks],
        headline=words.headline(summary, run.labels, run.titles),
        inside=inside,
        losses=words.losses(summary, short),
        missing=parts.missing,
        names=short,
        notebook=presets.NOTEBOOKS[experiment.preset],
        one_replicate=console.ONE_REPLICATE,
        run=run,
        seconds=float(np.median([line["seconds"] for line in run.lines])),
        summary=summary,
        tables=console.tables(summary, run.titles, wide=True),
    )
    rundir.write_bytes(path / "report.html", html.encode(errors="replace"))
    for part in parts.missing:
        warnings.warn(f"the report lacks {part}", rundir.ReportWarning, stacklevel=2)
    rundir.write_json(path / "summary.json", summary)
    return summary


def look_inside(run: Run, replicate: int, parts: Parts, names: Mapping[str, str]) -> dict[str, Any]:
    """What the page shows of a replicate that was finite to the end; writes `features.png`."""
    example, end = parts.read("example"), parts.read("end")
    found = [parts.read(f"epoch-{k:03}") for k in range(1, run.epochs + 1)]
    epochs = [probes for probes in found if probes]
    first, last = found[0], found[-1]
    labels = figures.shorten_all(run.labels)
    rows = f"a row for each network, {', '.join(names.values())}"
    pictures: list[Picture] = []

    def add(what: str, draw: Callable[[], Picture]) -> None:
        if picture := parts.make(what, draw):
            pictures.append(picture)

    if example and last:

        def draw_features() -> Picture:
            label, image = int(example["label"]), example["image"]
            png = figures.to_png(figures.features(image, label, last, labels, replicate))
            told = words.features(last, names, replicate)
            rundir.write_bytes(run.path / "features.png", png)
            return Picture(
                "One digit through the layers",
                png_uri(png),
                f"A test example of class {label} and what leaves each hidden layer: {rows}.",
                "What leaves each hidden layer after the last epoch, each layer on its own scale. "
                f"Blue cells are padding. {told}",
                dark=False,
            )

        add("the digit through the layers", draw_features)
    if len(epochs) == len(found):
        add(
            "the activations over the epochs",
            lambda: Picture(
                "What enters the activations, over the epochs",
                _to_uri(layers.percentiles(epochs, labels, replicate)),
                f"Percentiles of what enters the activations, by layer and epoch: {rows}.",
                "Line: the median. Dark band: the middle half; light band: nine tenths of all "
                "values, of a fixed sample of training examples with running statistics. Batch "
                "normalization brings them to mean 0 and deviation 1, then scales and shifts them "
                f"by what it has learned. {words.activations(epochs[-1], names, replicate)}"
                f"{_tell_choice(epochs[-1], labels)}",
            ),
        )
    if first and last:
        add(
            "the histograms of the activations",
            lambda: Picture(
                "What enters the activations, first and last epoch",
                _to_uri(layers.histograms(first, last, labels, replicate)),
                f"Histograms of the same values after the first and the last epoch: {rows}.",
                f"Dotted after the first epoch, solid after the last.{_tell_choice(last, labels)}",
            ),
        )
        bands = " Bands are 95 % intervals, cut where they would leave the picture."
        add(
            "the gradients",
            lambda: Picture(
                "How strong the gradients are",
                _to_uri(layers.gradient_norms(first, last, labels)),
                "Norms of the gradients by layer after the first and the last epoch, a line for "
                "each network.",
                "Norm of the gradient of the sample's loss in each kernel, in training mode. A "
                "steep line means that some layers learn from much stronger gradients than others. "
                f"{words.gradients(last, names)}{bands * (run.experiment.replicates > 1)}",
            ),
        )
    normalized = [arm for arm in labels if end and layers.running_layers(end, arm)]
    if end and normalized:
        add(
            "the running statistics",
            lambda: Picture(
                "Running statistics and those of the training set",
                _to_uri(layers.statistics(end, labels)),
                "Running means and deviations against those of the training set, by layer: "
                f"{', '.join(names[arm] for arm in normalized)}.",
                "One dot for each unit that batch normalization normalizes. On the line the "
                "running average, by which evaluation normalizes, is what it estimates: the "
                "statistic of the training set under the final weights, here over chunks of some "
                f"thousand examples. {words.statistics(end, names)}",
            ),
        )
    return {
        "replicate": replicate,
        "pictures": pictures,
        "predictions": parts.make("the predictions", lambda: tabulate(end, run, names))
        if end
        else None,
    }


def tabulate(end: Probes, run: Run, names: Mapping[str, str]) -> dict[str, Any]:
    """What the networks say of the test set."""
    confusions = predictions.confusions(end, run.arms)
    return {
        "classes": predictions.classes(confusions),
        "confusions": confusions,
        "mistakes": words.mistakes(confusions, names),
        "most_mistakes": max(1, *(predictions.off_diagonal(c).max() for c in confusions.values())),
        "disagreements": predictions.disagreements(end, run.arms, run.reference),
    }


def _to_uri(figure: Figure) -> str:
    return svg_uri(figures.to_svg(figure))


def _tell_choice(probes: Probes, arms: Iterable[str]) -> str:
    depth = max(probes[f"{arm}/percentiles"].shape[1] for arm in arms)
    shown = [layer + 1 for layer in layers.choose_layers(depth)]
    return f" Of {depth} layers {', '.join(map(str, shown))} are drawn." * (len(shown) < depth)

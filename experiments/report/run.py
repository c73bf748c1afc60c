"""The page of a run, drawn from its files alone."""

import shlex
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bnjax.errors import CheckpointError, shorten
from experiments.lab import console, divergences, metrics, options, presets, rundir
from experiments.lab.run import Run
from experiments.report import figures, layers, predictions, words
from experiments.report.figures import Probes, Styles
from experiments.report.page import png_uri, render, svg_uri


class Parts:
    """The parts of a report, each of which may be missing without costing the others.

    Attributes:
        drawn: what is there, by what it is.
        missing: what is not, why, and what to do.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._path = run, shlex.quote(str(run.path))
        self.drawn: dict[str, Any] = {}
        self.missing: list[str] = []

    def read(self, name: str) -> Probes:
        """A file of `probes`; empty where it was not recorded."""
        found = self._run.probes(name) or {}
        if not found:
            again = f": python -m experiments.mnist_bn --resume {self._path} records it"
            what = f"what probes/{name}.npz would show, which is not there"
            self.missing.append(what + again * (name == "end"))
        return found

    def draw(self, what: str, make: Callable[[], Any]) -> None:
        """Adds what `make` returns, unless it fails; damaged files are an error."""
        try:
            self.drawn[what] = make()
        except (CheckpointError, rundir.WriteError):
            raise
        except Exception as error:
            again = f"python -m experiments.report {self._path} tries again"
            self.missing.append(f"{what} ({shorten(error)}): {again}")


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
    ended = ended or rundir.is_finished(path, experiment.epochs) or not run.lacks_end
    whole = experiment.epochs * experiment.replicates * len(run.arms)
    if len(run.lines) != whole or not ended:
        raise ValueError(
            f"{path} has not ended: go on with python -m experiments.mnist_bn --resume {path}, "
            f"which draws its report after {experiment.epochs} epochs"
        )
    summary = run.summarize()
    parts = Parts(run)
    styles = figures.arm_styles(run.labels)
    names = words.phrases(run.labels, run.titles)
    inside = look_inside(run, parts, styles, names)

    def draw_curves() -> str:
        figure = figures.curves(run.metrics, styles)
        png, svg = figures.to_png(figure), figures.to_svg(figure)
        rundir.write_bytes(path / "curves.png", png)
        rundir.write_bytes(path / "curves.svg", svg)
        return svg_uri(svg)

    parts.draw("the curves", draw_curves)
    html = render(
        "page.html.j2",
        certainty=console.format_certainty,
        command=options.repeat(run.config),
        config=run.config,
        divergences=[divergences.describe(mark, run.labels) for mark in summary["divergences"]],
        drawn=parts.drawn,
        final=console.format_final,
        format=console.format_summary,
        headline=words.headline(summary, run.labels, run.titles),
        inside=inside,
        losses=words.losses(summary, names),
        missing=parts.missing,
        names=names,
        notebook=presets.NOTEBOOKS[experiment.preset],
        one_replicate=console.ONE_REPLICATE,
        run=run,
        seconds=float(np.median([line["seconds"] for line in run.lines])),
        summary=summary,
    )
    rundir.write_bytes(path / "report.html", html.encode(errors="replace"))
    for part in parts.missing:
        warnings.warn(f"the report lacks {part}", rundir.ReportWarning, stacklevel=2)
    rundir.write_json(path / "summary.json", summary)
    return summary


def look_inside(run: Run, parts: Parts, styles: Styles, names: Mapping[str, str]) -> dict[str, Any]:
    """What the page shows of a replicate in which most networks were finite to the end.

    Those that diverged in it are left out. Writes `features.png`.
    """
    replicate = metrics.replicate_to_look_into(run.metrics)
    if replicate is None:
        return {}
    lasting = [
        arm for arm in run.arms if np.isfinite(run.metrics[arm]["train_cost"][-1, replicate])
    ]
    styles = {arm: styles[arm] for arm in lasting}
    names = {arm: names[arm] for arm in lasting}
    example, end = parts.read("example"), parts.read("end")
    epochs = [parts.read(f"epoch-{k:03}") for k in range(1, run.epochs + 1)]
    first, last = epochs[0], epochs[-1]
    label = int(example["label"]) if example else 0

    def draw_features() -> dict[str, str]:
        figure = figures.features(example["image"], label, last, styles, replicate)
        png = figures.to_png(figure)
        rundir.write_bytes(run.path / "features.png", png)
        return {"uri": png_uri(png), "told": words.features(last, names, replicate)}

    if example and last:
        parts.draw("the digit through the layers", draw_features)
    if all(epochs):
        parts.draw(
            "the activations over the epochs",
            lambda: _picture(
                layers.percentiles(epochs, styles, replicate),
                words.activations(last, names, replicate),
            ),
        )
    if first and last:
        parts.draw(
            "the histograms of the activations",
            lambda: _picture(layers.histograms(first, last, styles, replicate)),
        )
        parts.draw(
            "the gradients",
            lambda: _picture(
                layers.gradient_norms(first, last, styles), words.gradients(last, names)
            ),
        )
    normalized = [names[arm] for arm in lasting if layers.running_layers(end, arm)]
    if normalized:
        parts.draw(
            "the running statistics",
            lambda: _picture(layers.statistics(end, styles), words.statistics(end, names)),
        )
    if end:
        parts.draw("the predictions", lambda: tabulate(end, run, names))
    return {
        "choice": words.choice(last, names) if last else "",
        "label": label,
        "names": names,
        "normalized": normalized,
        "replicate": replicate,
    }


def tabulate(end: Probes, run: Run, names: Mapping[str, str]) -> dict[str, Any]:
    """What the networks of these names say of the test set.

    Who alone was right is known only where none is left out.
    """
    arms, whole = list(names), len(names) == len(run.arms)
    counts = predictions.confusions(end, arms)
    others = any(of_arm[:, -1].any() for of_arm in counts.values())
    return {
        "classes": [*map(str, range(predictions.CLASSES)), *["other"] * others],
        "confusions": counts,
        "mistakes": words.mistakes(counts, names),
        "most_mistakes": max(1, *(predictions.mistakes(c).max() for c in counts.values())),
        "disagreements": predictions.disagreements(end, arms, run.reference) if whole else {},
    }


def _picture(figure: Figure, told: str = "") -> dict[str, str]:
    return {"uri": svg_uri(figures.to_svg(figure)), "told": told}

"""The page of a run, drawn from its files alone."""

import shlex
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bnjax.errors import CheckpointError, shorten
from bnjax.files import WriteError
from bnjax.statistics import summarize
from experiments.lab import divergences, metrics, options, presets, rundir
from experiments.lab.run import Run
from experiments.report import figures, layers, predictions, words
from experiments.report.figures import Probes, Styles, features_of
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

    def draw(self, what: str, needed: Iterable[Any], make: Callable[[], Any]) -> None:
        """Adds what `make` returns where all `needed` is there; only damaged files are an error."""
        try:
            if all(needed):
                self.drawn[what] = make()
        except (CheckpointError, WriteError):
            raise
        except Exception as error:
            again = f"python -m experiments.report {self._path} tries again"
            self.missing.append(f"{what} ({shorten(error)}): {again}")


def redraw(path: Path, *, ended: bool = False) -> dict[str, Any]:
    """Writes `summary.json`, the pictures and `report.html` of a run that has ended.

    A part that cannot be drawn or was not recorded costs a `ReportWarning` and a line on the page.
    The summary is returned.

    Args:
        path: a run directory with `config.json`, `metrics.jsonl` and `probes`.
        ended: known to have ended, whatever could not be recorded at the end.

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
    inside = look_inside(run, parts, styles)

    def draw_curves() -> str:
        figure = figures.curves(run.metrics, styles)
        png, svg = figures.to_png(figure), figures.to_svg(figure)
        rundir.write_bytes(path / "curves.png", png)
        rundir.write_bytes(path / "curves.svg", svg)
        return svg_uri(svg)

    parts.draw("the curves", (), draw_curves)
    html = render(
        "page.html.j2",
        config=run.config,
        divergences=[divergences.describe(mark, run.labels) for mark in summary["divergences"]],
        headline=words.headline(summary, run.labels, run.titles),
        inside=inside,
        names=names,
        notebook=presets.NOTEBOOKS[experiment.preset],
        parts=parts,
        repeat=options.repeat,
        run=run,
        seconds=float(np.median([line["seconds"] for line in run.lines])),
        summary=summary,
    )
    rundir.write_bytes(path / "report.html", html.encode(errors="replace"))
    for part in parts.missing:
        warnings.warn(f"the report lacks {part}", rundir.ReportWarning, stacklevel=2)
    rundir.write_json(path / "summary.json", summary)
    return summary


def look_inside(run: Run, parts: Parts, styles: Styles) -> dict[str, Any]:
    """What the page shows of a replicate in which most networks were finite to the end.

    Those that diverged in it are left out. Writes `features.png`.
    """
    replicate = metrics.replicate_to_look_into(run.metrics)
    if replicate is None:
        return {}
    arms = [arm for arm in run.arms if np.isfinite(run.metrics[arm]["train_cost"][-1, replicate])]
    styles = {arm: styles[arm] for arm in arms}
    example, end = parts.read("example"), parts.read("end")
    epochs = [parts.read(f"epoch-{k:03}") for k in range(1, run.epochs + 1)]
    first, last = ends = epochs[0], epochs[-1]
    normalized = [arm for arm in arms if layers.running_layers(end, arm)]
    label = int(example["label"]) if example else 0
    depth = max(last[f"{arm}/percentiles"].shape[1] for arm in arms) if last else 0

    def draw_features() -> dict[str, Any]:
        figure = figures.features(example["image"], label, last, styles, replicate)
        png = figures.to_png(figure)
        rundir.write_bytes(run.path / "features.png", png)
        zeros = {arm: [np.mean(x == 0) for x in features_of(last, arm, replicate)] for arm in arms}
        return {"uri": png_uri(png), "told": zeros}

    def draw_activations() -> dict[str, Any]:
        spreads = {arm: last[f"{arm}/percentiles"][replicate, -1] for arm in arms}
        return _picture(layers.percentiles(epochs, styles, replicate), spreads)

    def draw_histograms() -> dict[str, Any]:
        return _picture(layers.histograms(first, last, styles, replicate), {})

    def draw_gradients() -> dict[str, Any]:
        norms = {arm: last[f"{arm}/gradient_norms"].T for arm in arms}
        means = {arm: [summarize(layer).mean for layer in norms[arm]] for arm in arms}
        return _picture(layers.gradient_norms(first, last, styles), means)

    def draw_statistics() -> dict[str, Any]:
        told = {arm: words.statistics(end, arm) for arm in normalized}
        return _picture(layers.statistics(end, styles), told)

    parts.draw("the digit through the layers", (example, last), draw_features)
    parts.draw("the activations over the epochs", epochs, draw_activations)
    parts.draw("the histograms of the activations", ends, draw_histograms)
    parts.draw("the gradients", ends, draw_gradients)
    parts.draw("the running statistics", [normalized], draw_statistics)
    parts.draw("the predictions", [end], lambda: tabulate(end, run, arms))
    return {
        "arms": arms,
        "chosen": layers.choose_layers(depth),
        "depth": depth,
        "label": label,
        "normalized": normalized,
        "replicate": replicate,
    }


def tabulate(end: Probes, run: Run, arms: Sequence[str]) -> dict[str, Any]:
    """What the networks of these arms say of the test set.

    Who alone was right is known only where none is left out.
    """
    counts = {arm: predictions.confusion(end, arm) for arm in arms}
    whole = len(arms) == len(run.arms)
    others = any(of_arm[:, -1].any() for of_arm in counts.values())
    return {
        "classes": [*map(str, range(predictions.CLASSES)), *["other"] * others],
        "confusions": counts,
        "mistakes": {arm: words.mistakes(of_arm) for arm, of_arm in counts.items()},
        "most_mistakes": max(1, *(predictions.mistakes(c).max() for c in counts.values())),
        "disagreements": predictions.disagreements(end, arms, run.reference) if whole else {},
    }


def _picture(figure: Figure, told: Mapping[str, Any]) -> dict[str, Any]:
    return {"uri": svg_uri(figures.to_svg(figure)), "told": told}

"""The page of a run, drawn from its files alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import divergences, metrics, options, runs
from experiments.console import ONE_REPLICATE, TITLES, format_certainty, format_summary
from experiments.presets import Experiment
from experiments.report import figures, layers, predictions, words
from experiments.report.figures import Probes, read_arrays
from experiments.report.page import Picture, png_uri, render, svg_uri


def redraw(path: Path) -> dict[str, Any]:
    """Writes `summary.json`, the pictures and `report.html` of a run that has ended.

    Args:
        path: a run directory with `config.json`, `metrics.jsonl` and `probes`.

    Returns:
        The summary.

    Raises:
        ValueError: if the run has not ended, or files are damaged.
    """
    config = runs.read_config(path)
    experiment = Experiment.load(config["experiment"])
    lines = metrics.read(path)
    replicate = metrics.finite_to_the_end(lines) if lines else None
    expected = experiment.epochs * experiment.replicates * len(metrics.ARMS)
    lacks_end = replicate is not None and not (path / "probes" / "end.npz").exists()
    if len(lines) != expected or lacks_end:
        raise ValueError(
            f"{path} has not ended: go on with python -m experiments.mnist_bn --resume {path}, "
            f"which draws its report after {experiment.epochs} epochs"
        )
    marks = divergences.read(path)
    summary = {**metrics.summarize(lines), "divergences": marks}
    inside = {} if replicate is None else look_inside(path, experiment, replicate)

    curves = figures.curves(metrics.curves(lines))
    runs.write_bytes(path / "curves.png", figures.to_png(curves))
    curves_svg = figures.to_svg(curves)
    runs.write_bytes(path / "curves.svg", curves_svg)
    html = render(
        "page.html.j2",
        arms=metrics.ARMS,
        certainty=format_certainty,
        command=options.repeat(config),
        config=config,
        curves=svg_uri(curves_svg),
        divergences=[divergences.describe(mark) for mark in marks],
        experiment=experiment,
        format=format_summary,
        headline=words.headline(summary),
        losses=words.losses(summary),
        inside=inside,
        labels=metrics.LABELS,
        one_replicate=ONE_REPLICATE,
        seconds=float(np.median([line["seconds"] for line in lines])),
        summary=summary,
        titles=TITLES,
    )
    runs.write_bytes(path / "report.html", html.encode(errors="replace"))
    runs.write_json(path / "summary.json", summary)
    return summary


def look_inside(path: Path, experiment: Experiment, replicate: int) -> dict[str, Any]:
    """What the page shows of a replicate that was finite to the end; writes `features.png`."""
    directory = path / "probes"
    example, end = (read_arrays(directory / f"{name}.npz") for name in ("example", "end"))
    files = [directory / f"epoch-{k:03}.npz" for k in range(1, experiment.epochs + 1)]
    epochs = [read_arrays(file) for file in files]
    features = figures.features(example["image"], int(example["label"]), epochs[-1], replicate)
    png = figures.to_png(features)
    runs.write_bytes(path / "features.png", png)
    confusions = predictions.confusions(end)
    return {
        "replicate": replicate,
        "pictures": [
            Picture(
                "One digit through the layers",
                png_uri(png),
                words.features(int(example["label"]), epochs[-1], replicate),
                "What leaves each hidden layer after the last epoch, each layer on its own scale. "
                "Blue cells are padding.",
                dark=False,
            ),
            *draw(epochs, end, replicate, experiment.replicates),
        ],
        "classes": predictions.classes(confusions),
        "confusions": confusions,
        "mistakes": words.mistakes(confusions),
        "most_mistakes": max(1, *(predictions.off_diagonal(c).max() for c in confusions.values())),
        "disagreements": predictions.disagreements(end),
    }


def draw(epochs: Sequence[Probes], end: Probes, replicate: int, replicates: int) -> list[Picture]:
    """The pictures of what happens inside both networks."""
    first, last = epochs[0], epochs[-1]
    depth = last["bn/percentiles"].shape[1]
    shown = [layer + 1 for layer in layers.choose_layers(depth)]
    some = f" Of {depth} layers {', '.join(map(str, shown))} are drawn." * (len(shown) < depth)
    bands = " Bands are 95 % intervals, cut where they would leave the picture." * (replicates > 1)
    activations, gradients = words.activations(last, replicate), words.gradients(last)
    statistics = words.statistics(end)
    return [
        Picture(
            "What enters the activations, over the epochs",
            svg_uri(figures.to_svg(layers.percentiles(epochs, replicate))),
            "Percentiles of the values that enter the activations, by layer and epoch, with batch "
            f"normalization above and without below. {activations}",
            "Line: the median. Dark band: the middle half; light band: nine tenths of all values, "
            "of a fixed sample of training examples with running statistics. Batch normalization "
            "brings them to mean 0 and deviation 1, then scales and shifts them by what it has "
            f"learned. {activations}{some}",
        ),
        Picture(
            "What enters the activations, first and last epoch",
            svg_uri(figures.to_svg(layers.histograms(first, last, replicate))),
            f"Histograms of the same values after the first and the last epoch. {activations}",
            f"Dotted after the first epoch, solid after the last.{some}",
        ),
        Picture(
            "How strong the gradients are",
            svg_uri(figures.to_svg(layers.gradient_norms(first, last))),
            f"Norms of the gradients by layer. {gradients}",
            "Norm of the gradient of the sample's loss in each kernel, in training mode. A steep "
            "line means that some layers learn from much stronger gradients than others. "
            f"{gradients}{bands}",
        ),
        Picture(
            "Running statistics and those of the training set",
            svg_uri(figures.to_svg(layers.statistics(end))),
            f"Running statistics against those of the training set. {statistics}",
            "One dot for each unit of the network with batch normalization. On the line the "
            "running average, by which evaluation normalizes, is what it estimates: the statistic "
            "of the training set under the final weights, here over chunks of 5,000 examples. "
            f"{statistics}{some}",
        ),
    ]

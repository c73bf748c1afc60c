"""Heat maps of what batch normalization is worth."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from experiments.report.figures import our_style


@our_style
def maps(rows: Sequence[tuple[Any, Any]]) -> Figure:
    """Points of test accuracy over learning rates and batch sizes, a map for each activation.

    Args:
        rows: each cell of `experiments.sweep`, and what it says.
    """
    activations = list(dict.fromkeys(cell.activation for cell, _ in rows))
    rates = sorted({cell.learning_rate for cell, _ in rows})
    sizes = sorted({cell.batch_size for cell, _ in rows})
    points = np.full((len(activations), len(sizes), len(rates)), np.nan)
    texts = np.full(points.shape, "", object)
    for cell, worth in rows:
        place = (
            activations.index(cell.activation),
            sizes.index(cell.batch_size),
            rates.index(cell.learning_rate),
        )
        mean = worth.difference["mean"]
        points[place] = np.nan if mean is None else 100 * mean
        texts[place] = worth.told.replace(" ", "\n") if mean is None else f"{100 * mean:+.1f}"
    finite = np.abs(points[np.isfinite(points)])
    most = max(finite.max(initial=0), 0.1)
    size = (1.3 * len(rates) + 1.6, 0.9 * len(sizes) + 1.2)
    figure = Figure(figsize=(max(4.5, size[0] * len(activations)), size[1]), layout="constrained")
    row = figure.subplots(1, len(activations), squeeze=False)[0]
    colors = colormaps["RdBu"].with_extremes(bad="#bbbbbb")
    for axes, activation, table, told in zip(row, activations, points, texts, strict=True):
        image = axes.imshow(table, cmap=colors, vmin=-most, vmax=most, aspect="auto")
        for (y, x), value in np.ndenumerate(table):
            color = "white" if abs(value) > 0.6 * most else "black"
            axes.text(x, y, told[y, x], ha="center", va="center", color=color)
        axes.set_title(activation, loc="left", fontweight="bold")
        axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axes.set_yticks(range(len(sizes)), sizes)
        axes.set_xlabel("learning rate")
    row[0].set_ylabel("batch size")
    figure.colorbar(image, ax=list(row), label="points of test accuracy")
    return figure

"""Heat maps of what arms are worth over a grid."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from experiments.report.figures import our_style


@our_style
def maps(rows: Sequence[tuple[Any, Any]], labels: Mapping[str, str]) -> Figure:
    """Points of test accuracy over learning rates and batch sizes, for each arm and activation.

    Args:
        rows: each cell of `experiments.sweep`, and what it says.
        labels: of the arms that are held against the reference.
    """
    activations = list(dict.fromkeys(cell.activation for cell, _ in rows))
    rates = sorted({cell.learning_rate for cell, _ in rows})
    sizes = sorted({cell.batch_size for cell, _ in rows})
    points = np.full((len(labels), len(activations), len(sizes), len(rates)), np.nan)
    texts = np.full(points.shape, "", object)
    for k, arm in enumerate(labels):
        for cell, found in rows:
            place = (
                k,
                activations.index(cell.activation),
                sizes.index(cell.batch_size),
                rates.index(cell.learning_rate),
            )
            mean = found.differences[arm]["mean"]
            points[place] = np.nan if mean is None else 100 * mean
            told = found.told[arm].replace(" ", "\n")
            texts[place] = told if mean is None else f"{100 * mean:+.1f}"
    most = max(np.abs(points[np.isfinite(points)]).max(initial=0), 0.1)
    width, height = 1.3 * len(rates) + 1.6, 0.9 * len(sizes) + 1.2
    size = (max(4.5, width * len(activations)), height * len(labels))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(labels), len(activations), squeeze=False)
    colors = colormaps["RdBu"].with_extremes(bad="#bbbbbb")
    for k, arm in enumerate(labels):
        for axes, activation, table, told in zip(
            grid[k], activations, points[k], texts[k], strict=True
        ):
            image = axes.imshow(table, cmap=colors, vmin=-most, vmax=most, aspect="auto")
            for (y, x), value in np.ndenumerate(table):
                color = "white" if abs(value) > 0.6 * most else "black"
                axes.text(x, y, told[y, x], ha="center", va="center", color=color)
            title = activation if len(labels) == 1 else f"{labels[arm]}, {activation}"
            axes.set_title(title, loc="left", fontweight="bold")
            axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
            axes.set_yticks(range(len(sizes)), sizes)
            axes.set_xlabel("learning rate")
        grid[k, 0].set_ylabel("batch size")
    figure.colorbar(image, ax=list(grid.flat), label="points of test accuracy")
    return figure

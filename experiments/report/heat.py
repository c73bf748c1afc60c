"""Heat maps of what arms are worth over a grid."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from experiments.lab.cells import METRIC, CellResult, SweepCell
from experiments.report.figures import our_style


@our_style
def maps(rows: Sequence[tuple[SweepCell, CellResult]], labels: Mapping[str, str]) -> Figure:
    """Points of test accuracy over learning rates and batch sizes, for each arm and activation.

    Args:
        rows: each cell of a sweep, and what it says.
        labels: of the arms that are held against the reference.
    """
    results = {cell[:3]: result for cell, result in rows}
    activations = list(dict.fromkeys(activation for activation, _, _ in results))
    sizes = sorted({size for _, size, _ in results})
    rates = sorted({rate for _, _, rate in results})
    points = {
        (arm, *place): np.nan if mean is None else 100 * mean
        for place, result in results.items()
        for arm in labels
        for mean in (result.summary["differences"][arm][METRIC]["mean"],)
    }
    most = max([0.1, *(abs(value) for value in points.values() if np.isfinite(value))])
    width, height = 1.3 * len(rates) + 1.6, 0.9 * len(sizes) + 1.2
    size = (max(4.5, width * len(activations)), height * len(labels))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(labels), len(activations), squeeze=False)
    colors = colormaps["RdBu"].with_extremes(bad="#bbbbbb")
    for (i, k), axes in np.ndenumerate(grid):
        arm, activation = list(labels)[i], activations[k]
        table = [[points[arm, activation, size, rate] for rate in rates] for size in sizes]
        image = axes.imshow(table, cmap=colors, vmin=-most, vmax=most, aspect="auto")
        for (y, x), value in np.ndenumerate(table):
            told = results[activation, sizes[y], rates[x]].told[arm].replace(" ", "\n")
            told = f"{value:+.1f}" if np.isfinite(value) else told
            color = "white" if abs(value) > 0.6 * most else "black"
            axes.text(x, y, told, ha="center", va="center", color=color)
        title = activation if len(labels) == 1 else f"{labels[arm]}, {activation}"
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axes.set_yticks(range(len(sizes)), sizes)
        axes.set(xlabel="learning rate", ylabel="" if k else "batch size")
        axes.spines[:].set_visible(True)
    figure.colorbar(image, ax=list(grid.flat), label="points of test accuracy")
    return figure

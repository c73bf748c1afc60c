"""Heat maps of what arms are worth over a grid."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from experiments.lab.cells import SweepCell
from experiments.report.figures import our_style


@our_style
def maps(cells: Sequence[SweepCell], labels: Mapping[str, str]) -> Figure:
    """Points of test accuracy over learning rates and batch sizes, for each arm and activation.

    The labels are those of the arms that are held against the reference.
    """
    at = {tuple(cell.setting.values()): cell for cell in cells}
    activations = list(dict.fromkeys(activation for activation, _, _ in at))
    sizes, rates = (sorted({place[k] for place in at}) for k in (1, 2))
    most = np.nanmax([0.1, *(abs(cell.points(arm)) for cell in cells for arm in labels)])
    width, height = 1.3 * len(rates) + 1.6, 0.9 * len(sizes) + 1.2
    size = (max(4.5, width * len(activations)), height * len(labels))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(labels), len(activations), squeeze=False)
    colors = colormaps["RdBu"].with_extremes(bad="#bbbbbb")
    for (i, k), axes in np.ndenumerate(grid):
        arm, activation = list(labels)[i], activations[k]
        rows = [[at[activation, size, rate] for rate in rates] for size in sizes]
        table = [[cell.points(arm) for cell in row] for row in rows]
        image = axes.imshow(table, cmap=colors, vmin=-most, vmax=most, aspect="auto")
        for (y, x), value in np.ndenumerate(table):
            lost = rows[y][x].tell(arm).replace(" ", "\n")
            told = f"{value:+.1f}" if np.isfinite(value) else lost
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

"""Pictures of what happens inside both networks, layer by layer."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.lab.metrics import ARMS, LABELS
from experiments.report.figures import STYLES, Probes, draw_band, our_style

# Of a deep network so many layers are drawn, the first and the last among them.
COLUMNS = 5


def choose_layers(layers: int) -> list[int]:
    """Which layers are drawn, counted from 0.

    Example:
        >>> choose_layers(2), choose_layers(20)
        ([0, 1], [0, 5, 10, 14, 19])
    """
    return np.unique(np.linspace(0, layers - 1, min(layers, COLUMNS)).round().astype(int)).tolist()


@our_style
def percentiles(epochs: Sequence[Probes], replicate: int = 0) -> Figure:
    """How the values that enter the activations spread, over the epochs, in each layer.

    Args:
        epochs: probes of each epoch.
        replicate: which one is drawn.
    """
    by_arm = {
        arm: np.stack([probes[f"{arm}/percentiles"][replicate] for probes in epochs])
        for arm in ARMS
    }  # [epochs, D, P]
    chosen = choose_layers(by_arm["bn"].shape[1])
    figure, grid = _panels([f"layer {k + 1}" for k in chosen], rows=len(ARMS), below="epoch")
    numbers = np.arange(1, len(epochs) + 1)
    for above, below in grid.T:
        below.sharey(above)
    for row, arm in zip(grid, ARMS, strict=True):
        color, marker = STYLES[arm]["color"], STYLES[arm]["marker"]
        for axes, layer in zip(row, chosen, strict=True):
            low, lower, middle, upper, high = by_arm[arm][:, layer].T
            axes.fill_between(numbers, low, high, color=color, alpha=0.15, linewidth=0)
            axes.fill_between(numbers, lower, upper, color=color, alpha=0.3, linewidth=0)
            axes.plot(numbers, middle, color=color, marker=marker, markersize=3)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.grid(alpha=0.25, linewidth=0.5)
        row[0].set_ylabel(f"{LABELS[arm]}\nvalue", fontweight="bold")
    return figure


@our_style
def histograms(first: Probes, last: Probes, replicate: int = 0) -> Figure:
    """The values that enter the activations after the first epoch and after the last.

    Args:
        first: probes of the first epoch.
        last: of the last.
        replicate: which one is drawn.
    """
    chosen = choose_layers(last["bn/histograms"].shape[1])
    figure, grid = _panels([f"layer {k + 1}" for k in chosen], rows=len(ARMS), below="value")
    for above, below in grid.T:
        below.sharex(above)
    for row, arm in zip(grid, ARMS, strict=True):
        for axes, layer in zip(row, chosen, strict=True):
            for probes, style in ((first, {"linestyle": ":"}), (last, {"linewidth": 1.8})):
                counts, edges = (
                    probes[f"{arm}/{name}"][replicate, layer] for name in ("histograms", "edges")
                )
                if np.isfinite(edges).all() and edges[-1] > edges[0]:
                    density = counts / counts.sum() / np.diff(edges)
                    axes.stairs(density, edges, color=STYLES[arm]["color"], **style)
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
        row[0].set_ylabel(LABELS[arm], fontweight="bold")
    return figure


@our_style
def gradient_norms(first: Probes, last: Probes) -> Figure:
    """Norms of the gradients of all kernels, from the input on.

    Args:
        first: probes of the first epoch.
        last: of the last; several replicates are drawn as their mean within its 95 % interval.
    """
    titles = ["After the first epoch", "After the last epoch"]
    below = "Dense layer, from the input on"
    figure, (row,) = _panels(titles, rows=1, below=below, width=4.2, height=3.2)
    row[1].sharey(row[0])
    for axes, probes in zip(row, (first, last), strict=True):
        for arm in ARMS:
            norms = probes[f"{arm}/gradient_norms"]
            draw_band(axes, arm, np.arange(1, norms.shape[1] + 1), norms)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.25, linewidth=0.5)
        if any((probes[f"{arm}/gradient_norms"] > 0).any() for arm in ARMS):
            axes.set_yscale("log")
    row[0].set_ylabel("norm of the gradient, log scale")
    row[0].legend(frameon=False)
    return figure


def batch_norms(end: Probes) -> list[str]:
    """The names of the batch normalizations, from the input on."""
    names = {name.split("/")[1] for name in end if name.startswith("running/")}
    return sorted(names, key=lambda name: int(name.rpartition("_")[2]))


@our_style
def statistics(end: Probes) -> Figure:
    """Running statistics against those of the whole training set, one dot for each unit.

    Args:
        end: probes of the end.
    """
    names = batch_norms(end)
    chosen = choose_layers(len(names))
    figure, grid = _panels([f"layer {k + 1}" for k in chosen], rows=2, below="training set")
    for column, layer in zip(grid.T, chosen, strict=True):
        for axes, statistic in zip(column, ("mean", "var"), strict=True):
            whole, running = (
                end[f"{kind}/{names[layer]}/{statistic}"] for kind in ("population", "running")
            )
            if statistic == "var":
                whole, running = np.sqrt(whole), np.sqrt(running)
            axes.axline((float(whole[0]), float(whole[0])), slope=1, color="gray", linewidth=0.8)
            axes.plot(whole, running, ".", color=STYLES["bn"]["color"], alpha=0.7)
    grid[0, 0].set_ylabel("running mean", fontweight="bold")
    grid[1, 0].set_ylabel("running deviation", fontweight="bold")
    return figure


def _panels(
    titles: Sequence[str], *, rows: int, below: str, width: float = 2.6, height: float = 2.2
) -> tuple[Figure, np.ndarray]:
    """Panels of that size in inches; fixed margins are drawn twice as fast as found ones."""
    size = (width * len(titles) + 0.8, height * rows + 0.6)
    left, right, bottom, top = 1.0 / size[0], 0.15 / size[0], 0.5 / size[1], 0.35 / size[1]
    figure = Figure(figsize=size)
    figure.subplots_adjust(left, bottom, 1 - right, 1 - top, wspace=0.25, hspace=0.2)
    grid = figure.subplots(rows, len(titles), squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, loc="left", fontweight="bold")
    for axes in grid[-1]:
        axes.set_xlabel(below)
    return figure, grid

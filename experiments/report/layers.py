"""Pictures of what happens inside the networks, layer by layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report import figures
from experiments.report.figures import Probes, Styles, our_style

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
def percentiles(epochs: Sequence[Probes], styles: Styles, replicate: int = 0) -> Figure:
    """How the values that enter the activations spread, over the epochs, in each layer.

    Args:
        epochs: probes of each epoch.
        styles: of `figures.arm_styles`, here and below; its arms are drawn, in a row each.
        replicate: which one is drawn.
    """
    depths = {arm: epochs[0][f"{arm}/percentiles"].shape[1] for arm in styles}
    figure, panels = _panels(depths, "epoch", sharey="col")
    numbers = np.arange(1, len(epochs) + 1)
    for axes, arm, layer in panels:
        spreads = [probes[f"{arm}/percentiles"][replicate, layer] for probes in epochs]
        low, lower, middle, upper, high = np.transpose(spreads)
        color, marker = styles[arm]["color"], styles[arm]["marker"]
        axes.fill_between(numbers, low, high, color=color, alpha=0.15, linewidth=0)
        axes.fill_between(numbers, lower, upper, color=color, alpha=0.3, linewidth=0)
        axes.plot(numbers, middle, color=color, marker=marker, markersize=3)
        axes.set_ylabel("" if layer else f"{styles[arm]['label']}\nvalue")
        axes.grid()
        figures.count_by_ones(axes.xaxis)
    return figure


@our_style
def histograms(first: Probes, last: Probes, styles: Styles, replicate: int = 0) -> Figure:
    """The values that enter the activations after the first epoch, dotted, and after the last."""
    depths = {arm: last[f"{arm}/histograms"].shape[1] for arm in styles}
    figure, panels = _panels(depths, "value", sharex="col")
    for axes, arm, layer in panels:
        for probes, line in ((first, {"linestyle": ":"}), (last, {"linewidth": 1.8})):
            counts = probes[f"{arm}/histograms"][replicate, layer]
            edges = probes[f"{arm}/edges"][replicate, layer]
            if np.isfinite(edges).all() and edges[-1] > edges[0]:
                density = counts / counts.sum() / np.diff(edges)
                axes.stairs(density, edges, color=styles[arm]["color"], **line)
        axes.set(ylabel="" if layer else styles[arm]["label"], yticks=[])
        axes.spines["left"].set_visible(False)
    return figure


@our_style
def gradient_norms(first: Probes, last: Probes, styles: Styles) -> Figure:
    """Norms of the gradients of all kernels after the first epoch and the last, by replicates."""
    figure, row = figures.panels(["After the first epoch", "After the last epoch"], height=3.4)
    row[1].sharey(row[0])
    for axes, probes in zip(row, (first, last), strict=True):
        norms = {arm: probes[f"{arm}/gradient_norms"] for arm in styles}  # [R, L]
        for arm, values in norms.items():
            figures.draw_band(axes, styles[arm], np.arange(1, values.shape[1] + 1), values)
        axes.set_xlabel("layer with a kernel, from the input on")
        axes.grid()
        if any((values > 0).any() for values in norms.values()):
            axes.set_yscale("log")
    row[0].set_ylabel("norm of the gradient, log scale")
    figures.add_legend(figure)
    return figure


def running_layers(end: Probes, arm: str) -> list[str]:
    """The layers of an arm that have a running mean and variance, from the input on."""
    prefix, suffix = f"{arm}/running/", "/var"
    names = (name for name in end if name.startswith(prefix) and name.endswith(suffix))
    return [name.removeprefix(prefix).removesuffix(suffix) for name in names]


@our_style
def statistics(end: Probes, styles: Styles) -> Figure:
    """Running statistics against those of the training set, one dot for each unit.

    Arms that have running statistics get two rows each.
    """
    names = {arm: layers for arm in styles if (layers := running_layers(end, arm))}
    rows = {(arm, what): len(names[arm]) for arm in names for what in ("mean", "var")}
    figure, panels = _panels(rows, "training set")
    for axes, (arm, what), layer in panels:
        place = f"{names[arm][layer]}/{what}"
        whole, running = (end[f"{arm}/{of}/{place}"] for of in ("population", "running"))
        told = "running mean"
        if what == "var":
            whole, running, told = np.sqrt(whole), np.sqrt(running), "running deviation"
        axes.axline((float(whole[0]), float(whole[0])), slope=1, color="gray", linewidth=0.8)
        axes.plot(whole, running, ".", color=styles[arm]["color"], alpha=0.7)
        told = f"{styles[arm]['label']}\n" * (len(names) > 1) + told
        axes.set_ylabel("" if layer else told)
    return figure


def _panels(
    depths: Mapping[Any, int], below: str, **share: Any
) -> tuple[Figure, list[tuple[Axes, Any, int]]]:
    """A row of panels for each key of `{row: layers}`: axes, row and layer of those that are drawn.

    Fixed margins are drawn twice as fast as found ones.
    """
    rows = [(row, choose_layers(depth)) for row, depth in depths.items()]
    columns = max(len(chosen) for _, chosen in rows)
    width, height = 2.6 * columns + 0.8, 2.2 * len(rows) + 0.6
    margins = {"left": 1 / width, "right": 1 - 0.15 / width}
    margins |= {"bottom": 0.5 / height, "top": 1 - 0.35 / height, "wspace": 0.25, "hspace": 0.2}
    figure = Figure(figsize=(width, height))
    grid = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw=margins, **share)
    panels = []
    for (k, column), axes in np.ndenumerate(grid):
        row, chosen = rows[k]
        axes.set_visible(column < len(chosen))
        if column < len(chosen):
            if k == 0 or chosen != rows[k - 1][1]:
                axes.set_title(f"layer {chosen[column] + 1}", loc="left", fontweight="bold")
            axes.set_xlabel(below if k == len(rows) - 1 else "")
            axes.yaxis.label.set_fontweight("bold")
            axes.tick_params(labelbottom=True)
            panels.append((axes, row, chosen[column]))
    return figure, panels

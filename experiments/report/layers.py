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
    by_arm = {
        arm: np.stack([probes[f"{arm}/percentiles"][replicate] for probes in epochs])
        for arm in styles
    }  # [epochs, D, P]
    figure, rows = _panels([len(values[0]) for values in by_arm.values()], "epoch", sharey="col")
    numbers = np.arange(1, len(epochs) + 1)
    for row, (arm, style) in zip(rows, styles.items(), strict=True):
        color = style["color"]
        for layer, axes in row.items():
            low, lower, middle, upper, high = by_arm[arm][:, layer].T
            axes.fill_between(numbers, low, high, color=color, alpha=0.15, linewidth=0)
            axes.fill_between(numbers, lower, upper, color=color, alpha=0.3, linewidth=0)
            axes.plot(numbers, middle, color=color, marker=style["marker"], markersize=3)
            figures.count_by_ones(axes.xaxis)
            axes.grid()
        _name_row(row, f"{style['label']}\nvalue")
    return figure


@our_style
def histograms(first: Probes, last: Probes, styles: Styles, replicate: int = 0) -> Figure:
    """The values that enter the activations after the first epoch, dotted, and after the last."""
    depths = [last[f"{arm}/histograms"].shape[1] for arm in styles]
    figure, rows = _panels(depths, "value", sharex="col")
    for row, (arm, style) in zip(rows, styles.items(), strict=True):
        for layer, axes in row.items():
            for probes, line in ((first, {"linestyle": ":"}), (last, {"linewidth": 1.8})):
                counts, edges = (
                    probes[f"{arm}/{name}"][replicate, layer] for name in ("histograms", "edges")
                )
                if np.isfinite(edges).all() and edges[-1] > edges[0]:
                    density = counts / counts.sum() / np.diff(edges)
                    axes.stairs(density, edges, color=style["color"], **line)
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
        _name_row(row, style["label"])
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
    kinds = [(arm, what) for arm in names for what in ("mean", "var")]
    figure, rows = _panels([len(names[arm]) for arm, _ in kinds], "training set")
    for (arm, what), row in zip(kinds, rows, strict=True):
        for layer, axes in row.items():
            whole, running = (
                end[f"{arm}/{kind}/{names[arm][layer]}/{what}"]
                for kind in ("population", "running")
            )
            if what == "var":
                whole, running = np.sqrt(whole), np.sqrt(running)
            axes.axline((float(whole[0]), float(whole[0])), slope=1, color="gray", linewidth=0.8)
            axes.plot(whole, running, ".", color=styles[arm]["color"], alpha=0.7)
        told = f"running {'mean' if what == 'mean' else 'deviation'}"
        _name_row(row, f"{styles[arm]['label']}\n{told}" if len(names) > 1 else told)
    return figure


def _panels(
    depths: Sequence[int], below: str, **share: Any
) -> tuple[Figure, list[dict[int, Axes]]]:
    """A row of panels for each network of that many layers: `{layer: panel}` of those drawn.

    Fixed margins are drawn twice as fast as found ones.
    """
    chosen = [choose_layers(depth) for depth in depths]
    columns = max(map(len, chosen))
    width, height = 2.6 * columns + 0.8, 2.2 * len(depths) + 0.6
    margins = {"left": 1 / width, "right": 1 - 0.15 / width}
    margins |= {"bottom": 0.5 / height, "top": 1 - 0.35 / height}
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(**margins, wspace=0.25, hspace=0.2)
    grid = figure.subplots(len(depths), columns, squeeze=False, **share)
    for axes in grid.flat:
        axes.tick_params(labelbottom=True)
        axes.set_visible(False)
    rows = [dict(zip(layers, row, strict=False)) for row, layers in zip(grid, chosen, strict=True)]
    for row, above in zip(rows, [{}, *rows], strict=False):
        for layer, axes in row.items():
            axes.set_visible(True)
            if row.keys() != above.keys():
                axes.set_title(f"layer {layer + 1}", loc="left", fontweight="bold")
    for axes in rows[-1].values():
        axes.set_xlabel(below)
    return figure, rows


def _name_row(row: Mapping[int, Axes], name: str) -> None:
    if row:
        row[0].set_ylabel(name, fontweight="bold")

"""The pictures of a run."""

import io
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib import style as style_sheets
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from bnjax.statistics import summarize

Probes = Mapping[str, np.ndarray]
Curves = Mapping[Any, Mapping[str, np.ndarray]]
Style = Mapping[str, Any]
Styles = Mapping[Any, Style]

# Decorates what makes pictures: they are the same under any matplotlibrc and in any notebook.
our_style = style_sheets.context(["default", Path(__file__).with_name("ours.mplstyle")])

# Eight colours, of different lightness, that the colour-blind tell apart; with one marker more, a
# ninth arm has the first colour again, but not the first marker.
COLORS = ["#0b5394", "#d9662b", "#1b9f6c", "#b860c0", "#c9a100", "#55b4e9", "#222222", "#e0a8b0"]
DASHES = ["-", "--", "-.", ":", (0, (8, 3)), (0, (3, 1, 1, 1, 1, 1)), (0, (5, 1)), (0, (1, 1))]
MARKERS = "os^DvP*X<"
NO_UNIT = colormaps["gray"].with_extremes(bad="#9fc5e8")
PANELS = (
    ("train_cost", "Training cost", "mean batch loss in nats, log scale"),
    ("test_loss", "Test loss", "mean cross entropy in nats, log scale"),
    ("test_accuracy", "Test accuracy", "percent"),
)


def panels(
    titles: Sequence[str], *, width: float = 4.2, height: float = 3.8
) -> tuple[Figure, list[Axes]]:
    """A row of empty panels, each of that size in inches."""
    figure = Figure(figsize=(width * len(titles), height), layout="constrained")
    row = list(figure.subplots(1, len(titles), squeeze=False)[0])
    for axes, title in zip(row, titles, strict=True):
        axes.set_title(title, loc="left", fontweight="bold")
        count_by_ones(axes.xaxis)
    return figure, row


def count_by_ones(axis: Axis) -> None:
    """Lets an axis bear integers alone."""
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def arm_styles(labels: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """`{arm: style}` of `{arm: label}`: told apart without colour, and by the colour-blind."""
    looks = zip(labels.items(), cycle(COLORS), cycle(DASHES), cycle(MARKERS), strict=False)
    return {
        arm: {"color": color, "linestyle": dash, "marker": marker, "label": _shorten(label)}
        for (arm, label), color, dash, marker in looks
    }


@our_style
def curves(by_arm: Curves, styles: Styles, columns: int = 4) -> Figure:
    """Training cost, test loss and test accuracy of all arms over the epochs.

    Args:
        by_arm: `{arm: {metric: [epochs, replicates]}}`. Several replicates are drawn as their
            mean within its 95 % confidence interval.
        styles: of `arm_styles`, here and below; its arms are drawn.
        columns: of the legend.
    """
    figure, row = panels([title for _, title, _ in PANELS], width=4, height=4)
    for axes, (metric, _, unit) in zip(row, PANELS, strict=True):
        scale = 100 if metric.endswith("accuracy") else 1
        for arm, style in styles.items():
            values = scale * by_arm[arm][metric].T
            draw_band(axes, style, np.arange(1, values.shape[1] + 1), values)
        if scale == 1 and any((by_arm[arm][metric] > 0).any() for arm in styles):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="epoch", ylabel=unit)
        axes.grid(which="both")
    add_legend(figure, columns)
    return figure


def overlay(runs: Mapping[str, Any]) -> Figure:
    """The same curves of each `Run` by name: a colour for each, dash and marker for each arm."""
    of_arms = arm_styles({arm: "" for run in runs.values() for arm in run.arms})
    lines, styles = {}, {}
    for k, (name, run) in enumerate(runs.items()):
        for arm, label in run.labels.items():
            told = f"{_shorten(name)}, {_shorten(label)}"
            lines[name, arm] = run.metrics[arm]
            styles[name, arm] = {**of_arms[arm], "color": f"C{k % 10}", "label": told}
    return curves(lines, styles, columns=2)


def add_legend(figure: Figure, columns: int = 4) -> None:
    """What the lines are: in each panel, or of more than two below all of them."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(labels) > 2:
        figure.set_figheight(figure.get_figheight() + 0.25 * math.ceil(len(labels) / columns))
        place: Any = "outside lower center"  # which matplotlib's types do not know
        figure.legend(handles, labels, handlelength=3.5, loc=place, ncols=columns)
    else:
        for axes in figure.axes:
            axes.legend()


def _shorten(name: str, most: int = 40) -> str:
    """A name as pictures can hold it."""
    shown = name.encode(errors="replace").decode()
    shown = shown if len(shown) <= most else f"…{shown[1 - most :]}"
    return shown.replace("$", r"\$")  # which would begin a formula


def draw_band(axes: Axes, style: Style, x: ArrayLike, values: ArrayLike, **changes: Any) -> None:
    """An arm's mean over replicates within its 95 % confidence interval.

    Args:
        style: of `arm_styles`; `changes` are what differs from it.
        x: `[N]`.
        values: `[R, N]`.
    """
    columns = np.asarray(values, np.float64).T
    summaries = [summarize(column) for column in columns]
    means = np.array([summary.mean for summary in summaries], np.float64)
    shown = {"markersize": 4, "linewidth": 1.6, **style, **changes}
    axes.plot(x, means, **shown)
    if columns.shape[1] > 1:
        bounds = np.array([summary.interval or (np.nan, np.nan) for summary in summaries])
        finite = columns[np.isfinite(columns)]
        if len(finite):  # an interval of two or three may be wider than all that can be
            reach = max(np.ptp(finite), 1e-6)
            bounds = bounds.clip(max(finite.min() - reach, finite.min() / 4), finite.max() + reach)
        axes.fill_between(x, *bounds.T, color=shown["color"], alpha=0.2, linewidth=0)


@our_style
def features(
    image: np.ndarray, label: int, probes: Probes, styles: Styles, replicate: int = 0
) -> Figure:
    """What leaves each hidden layer for one test example, a row for each arm.

    Args:
        image: `[28, 28]` the example.
        label: its class.
        probes: `{arm/features_k: [R, 1, H]}`, or `[R, 1, H, W, C]`.
        styles: as in `curves`.
        replicate: which one is drawn, its units or channels as a square.
    """
    by_arm = {arm: features_of(probes, arm, replicate) for arm in styles}
    columns = 1 + max(map(len, by_arm.values()))
    size = max(5.0, 1.25 * columns), 0.4 + 1.6 * len(by_arm)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(by_arm), columns, squeeze=False)
    for row, (arm, layers) in zip(grid, by_arm.items(), strict=True):
        name = styles[arm]["label"]
        row[0].imshow(image, cmap="gray")
        row[0].set_title("input", fontsize=9)
        row[0].set_ylabel(name, fontsize=min(11, 140 / len(name)), fontweight="bold")
        for axes in row[1 + len(layers) :]:
            axes.set_visible(False)
        for number, (axes, values) in enumerate(zip(row[1:], layers, strict=False), start=1):
            axes.imshow(_as_square(values), cmap=NO_UNIT)
            axes.set_title(f"layer {number}", fontsize=9)
            zeros = np.count_nonzero(values == 0)
            axes.set_xlabel(f"max {values.max():.3g}\n{zeros} of {values.size} zero", fontsize=7)
    for axes in grid.flat:
        axes.spines[:].set_visible(True)
        axes.set(xticks=[], yticks=[])
    figure.suptitle(f"A test example of class {label}, each layer on its own scale", fontsize=10)
    return figure


def features_of(probes: Probes, arm: str, replicate: int) -> list[np.ndarray]:
    """What leaves the hidden layers of an arm, from the input on: `[H]` or `[H, W, C]` each."""
    depth = sum(name.startswith(f"{arm}/features_") for name in probes)
    return [probes[f"{arm}/features_{k}"][replicate, 0] for k in range(1, depth + 1)]


def _as_square(values: np.ndarray) -> np.ndarray:
    """Channels, or units of one pixel each, beside and below each other."""
    tiles = np.moveaxis(values, -1, 0) if values.ndim == 3 else values[:, None, None]
    side = math.isqrt(len(tiles) - 1) + 1
    missing = side * side - len(tiles)
    tiles = np.pad(tiles, ((0, missing), (0, 0), (0, 0)), constant_values=np.nan)
    return np.block([list(tiles[k * side :][:side]) for k in range(side)])


@our_style
def train_eval_mode(numbers: Mapping[str, Any]) -> Figure:
    """The lesson of `experiments.train_eval_mode`: what training mode does to predictions.

    Args:
        numbers: as its `lesson` returns them.
    """
    dropout, alone, groups = numbers["dropout"], numbers["alone"], numbers["groups"]
    votes = dropout["torn_votes"]
    settled = [sum(votes) * (k == dropout["torn_evaluation"]) for k in range(len(votes))]
    torn = f"Dropout: one {dropout['torn_label']} in many calls"
    titles = [torn, "Each test image fed twice", "Judged by their company"]
    figure, (calls, twice, company) = panels(titles, width=4, height=4)
    training: Style = {"color": "#7b3f98", "label": "training mode"}
    evaluation: Style = {"color": "#1b7f5c", "label": "evaluation mode"}
    frame = {**evaluation, "edgecolor": evaluation["color"], "fill": False}
    for axes, counts, evaluated in (
        (calls, votes, settled),
        (twice, alone["twice"], alone["evaluation"]),
    ):
        axes.bar(range(len(counts)), counts, width=0.5, **training)
        axes.bar(range(len(counts)), evaluated, width=0.9, **frame)
        axes.set(xticks=range(len(counts)), xlabel="predicted class", ylabel="predictions")
        count_by_ones(axes.yaxis)
    sizes = ["1, twice", *map(str, groups["training"])]
    accuracies = [alone["accuracy"], *(one["accuracy"] for one in groups["training"].values())]
    company.plot(sizes, np.multiply(100, accuracies), "s--", **training)
    company.plot(sizes, [100 * groups["evaluation"]["accuracy"]] * len(sizes), "o-", **evaluation)
    company.set(ylim=(0, 105), xlabel="test images in a batch", ylabel="test accuracy in percent")
    below = calls.get_legend_handles_labels()
    figure.legend(*below, loc="outside lower center", ncols=2, frameon=True)
    return figure


@our_style
def to_png(figure: Figure) -> bytes:
    """The figure as a PNG at 150 dots per inch; its layout is settled then."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    figure.set_layout_engine("none")
    return buffer.getvalue()


@our_style
def to_svg(figure: Figure) -> bytes:
    """The figure as an SVG that is the same whenever the numbers are the same."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()

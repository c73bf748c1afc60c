"""The pictures of a run."""

import io
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context, rcParamsDefault
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from bnjax.errors import CheckpointError
from bnjax.statistics import summarize
from experiments.lab.metrics import ARMS, LABELS

Probes = Mapping[str, np.ndarray]

# Decorates what makes pictures: they are the same under any matplotlibrc and in any notebook.
OURS: dict[Any, Any] = {**rcParamsDefault, "svg.fonttype": "none", "svg.hashsalt": "bnjax"}
our_style = rc_context({name: value for name, value in OURS.items() if name != "backend"})

STYLES: dict[str, dict[str, Any]] = {
    "bn": {"color": "#0b5394", "linestyle": "-", "marker": "o"},
    "no_bn": {"color": "#d9662b", "linestyle": "--", "marker": "s"},
}
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
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure, row


@our_style
def curves(by_arm: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Training cost, test loss and test accuracy of both arms over the epochs.

    Args:
        by_arm: `{arm: {metric: [epochs, replicates]}}`. Several replicates are drawn as their
            mean within its 95 % confidence interval.
    """
    figure = _draw_curves([(by_arm[arm], arm, {}) for arm in ARMS])
    for axes in figure.axes:
        axes.legend(frameon=False)
    return figure


@our_style
def overlay(runs: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]) -> Figure:
    """The same curves of several runs, each in its colour; solid with BN, dashed without.

    Args:
        runs: `{name: {arm: {metric: [epochs, replicates]}}}`.
    """
    lines = [
        (by_arm[arm], arm, {"color": f"C{k % 10}", "label": f"{_shorten(name)}, {LABELS[arm]}"})
        for k, (name, by_arm) in enumerate(runs.items())
        for arm in ARMS
    ]
    figure = _draw_curves(lines)
    shown = figure.axes[0].get_legend_handles_labels()
    figure.set_figheight(4 + 0.25 * len(runs))
    figure.legend(*shown, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _shorten(name: str, most: int = 40) -> str:
    shown = name.encode(errors="replace").decode()
    shown = shown if len(shown) <= most else f"…{shown[1 - most :]}"
    return shown.replace("$", r"\$")  # which would begin a formula


def _draw_curves(
    lines: Sequence[tuple[Mapping[str, np.ndarray], str, Mapping[str, Any]]],
) -> Figure:
    figure, row = panels([title for _, title, _ in PANELS], width=4, height=4)
    for axes, (metric, _, unit) in zip(row, PANELS, strict=True):
        scale = 100 if metric.endswith("accuracy") else 1
        for by_metric, arm, style in lines:
            values = scale * by_metric[metric].T
            draw_band(axes, arm, np.arange(1, values.shape[1] + 1), values, **style)
        if scale == 1 and any((by_metric[metric] > 0).any() for by_metric, *_ in lines):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("epoch")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.25, which="both", linewidth=0.5)
    return figure


def draw_band(axes: Axes, arm: str, x: ArrayLike, values: ArrayLike, **style: Any) -> None:
    """An arm's mean over replicates within its 95 % confidence interval.

    Args:
        axes: where to draw.
        arm: "bn" or "no_bn"; decides colour and label.
        x: `[N]`.
        values: `[R, N]`.
        style: what differs from the arm's own.
    """
    columns = np.asarray(values, np.float64).T
    summaries = [summarize(column) for column in columns]
    means = [np.nan if summary.mean is None else summary.mean for summary in summaries]
    style = {"label": LABELS[arm], "markersize": 4, "linewidth": 1.6, **STYLES[arm], **style}
    axes.plot(x, means, **style)
    if columns.shape[1] > 1:
        bounds = np.array([summary.interval or (np.nan, np.nan) for summary in summaries])
        finite = columns[np.isfinite(columns)]
        if len(finite):  # an interval of two or three may be wider than all that can be
            reach = max(np.ptp(finite), 1e-6)
            bounds = bounds.clip(max(finite.min() - reach, finite.min() / 4), finite.max() + reach)
        axes.fill_between(x, *bounds.T, color=style["color"], alpha=0.2, linewidth=0)


@our_style
def features(image: np.ndarray, label: int, probes: Probes, replicate: int = 0) -> Figure:
    """What leaves each hidden layer for one test example, with and without normalization.

    Args:
        image: `[28, 28]` the example.
        label: its class.
        probes: `{arm/features_k: [R, 1, H]}`.
        replicate: which one is drawn, its H values as a square.
    """
    layers = sum(name.startswith(f"{ARMS[0]}/features_") for name in probes)
    figure = Figure(figsize=(max(5.0, 1.25 * (layers + 1)), 3.6), layout="constrained")
    grid = figure.subplots(len(ARMS), layers + 1, squeeze=False)
    for row, arm in zip(grid, ARMS, strict=True):
        row[0].imshow(image, cmap="gray")
        row[0].set_title("input", fontsize=9)
        row[0].set_ylabel(LABELS[arm], fontsize=11, fontweight="bold")
        for number, axes in enumerate(row[1:], start=1):
            values = probes[f"{arm}/features_{number}"][replicate, 0]
            axes.imshow(_as_square(values), cmap=NO_UNIT)
            axes.set_title(f"layer {number}", fontsize=9)
            zeros = np.count_nonzero(values == 0)
            axes.set_xlabel(f"max {values.max():.3g}\n{zeros} of {len(values)} zero", fontsize=7)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    figure.suptitle(f"A test example of class {label}, each layer on its own scale", fontsize=10)
    return figure


@our_style
def train_eval_mode(numbers: Mapping[str, Any]) -> Figure:
    """The lesson of `experiments.train_eval_mode`: what training mode does to predictions.

    Args:
        numbers: as its `lesson` returns them.
    """
    dropout, alone, groups = numbers["dropout"], numbers["alone"], numbers["groups"]
    training, evaluating = "#7b3f98", "#1b7f5c"
    figure = Figure(figsize=(12, 4), layout="constrained")
    calls, twice, company = figure.subplots(1, 3)
    settled = np.eye(10)[dropout["torn_evaluation"]] * sum(dropout["torn_votes"])
    for axes, counts, evaluation, title in (
        (
            calls,
            dropout["torn_votes"],
            settled,
            f"Dropout: one {dropout['torn_label']} in many calls",
        ),
        (twice, alone["twice"], alone["evaluation"], "Each test image fed twice"),
    ):
        axes.bar(range(10), counts, width=0.5, color=training, label="training mode")
        axes.bar(
            range(10),
            evaluation,
            width=0.9,
            fill=False,
            edgecolor=evaluating,
            label="evaluation mode",
        )
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xticks(range(10))
        axes.set_xlabel("predicted class")
        axes.set_ylabel("predictions")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    sizes = [str(size) for size in groups["training"]]
    accuracies = [100 * group["accuracy"] for group in groups["training"].values()]
    labels, values = ["1, twice", *sizes], [100 * alone["accuracy"], *accuracies]
    company.plot(labels, values, "s--", color=training, label="training mode")
    evaluation = np.full(len(labels), 100 * groups["evaluation"]["accuracy"])
    company.plot(labels, evaluation, "o-", color=evaluating, label="evaluation mode")
    company.set_ylim(0, 105)
    company.set_title("Judged by their company", loc="left", fontweight="bold")
    company.set_xlabel("test images in a batch")
    company.set_ylabel("test accuracy in percent")
    for axes in (calls, twice, company):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*calls.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


@our_style
def benchmark(epoch: Mapping[str, Any]) -> Figure:
    """Seconds per paired epoch and replicate of each contender, as bars on a log scale.

    Args:
        epoch: the part `epoch` of `experiments.benchmark`.
    """
    rows = epoch["seconds_per_replicate"]
    medians = [float(np.median(row["train"])) for row in rows.values()]
    colors = [STYLES["bn" if name.startswith("bnjax") else "no_bn"]["color"] for name in rows]
    figure = Figure(figsize=(8, 0.45 * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(rows), medians, color=colors)
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.axvline(epoch["floor"], color="gray", linestyle=":", label="matrix products alone")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(0.5 * min(*medians, epoch["floor"]), 2 * max(medians))
    axes.invert_yaxis()
    axes.set_xlabel("seconds per paired epoch and replicate, log scale")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    return figure


def _as_square(values: np.ndarray) -> np.ndarray:
    side = math.isqrt(len(values) - 1) + 1
    padded = np.full(side * side, np.nan)
    padded[: len(values)] = values
    return padded.reshape(side, side)


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


class Arrays(dict[str, np.ndarray]):
    """The arrays of a file, which says of one that it lacks."""

    def __init__(self, path: Path, arrays: Mapping[str, np.ndarray]) -> None:
        super().__init__(arrays)
        self._path = path

    def __missing__(self, name: str) -> np.ndarray:
        told = f"{self._path} lacks {name}: another version saved them, or they are damaged"
        raise CheckpointError(told)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file.

    Raises:
        CheckpointError: if it is none, or damaged.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return Arrays(path, file)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        told = f"{path} is damaged ({error}): delete it, and the rest can be drawn"
        raise CheckpointError(told) from None

"""The curves of a run, and a digit through the layers."""

import io
from itertools import combinations
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from factories import make_curves, make_lines, named
from matplotlib.colors import to_rgb
from PIL import Image

from experiments.lab import metrics
from experiments.report import figures

TWO = ("bn", "no_bn")
THREE = (*TWO, "layer_norm")
LABELS = named(THREE, "label")
STYLES = figures.arm_styles(LABELS)


DICHROMATS = {
    "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritan": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def draw(by_arm):
    return figures.curves(by_arm, {arm: STYLES[arm] for arm in by_arm})


@pytest.mark.parametrize(("epochs", "replicates"), [(1, 1), (4, 1), (4, 3), (20, 2)])
def test_curves_are_pictures(epochs, replicates):
    figure = draw(make_curves(epochs, replicates))
    with Image.open(io.BytesIO(figures.to_png(figure))) as png:
        assert (png.format, png.size) == ("PNG", (1800, 600))
    svg = ElementTree.fromstring(figures.to_svg(figure))
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"


def test_curves_label_everything():
    figure = draw(make_curves(3, 1))
    for axes, title in zip(figure.axes, ("cost", "loss", "accuracy"), strict=True):
        assert title in axes.get_title(loc="left")
        assert axes.get_xlabel() == "epoch"
        assert axes.get_ylabel()
        assert texts(axes.get_legend()) == ["with BN", "without BN"]


def test_curves_of_more_arms_have_one_legend():
    figure = draw(make_curves(3, 1, arms=THREE))
    assert [axes.get_legend() for axes in figure.axes] == [None] * 3
    assert texts(figure.legends[0]) == ["with BN", "without BN", "layer norm"]


def texts(legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def test_arms_differ_without_colour():
    """Any two of eight in dash and marker; any two of fifty in something."""
    styles = list(figures.arm_styles({str(k): "" for k in range(50)}).values())
    for one, other in combinations(styles[:8], 2):
        assert one["linestyle"] != other["linestyle"]
        assert one["marker"] != other["marker"]
    for one, other in combinations(styles, 2):
        assert (one["color"], one["marker"]) != (other["color"], other["marker"])


def test_colours_differ_for_the_colour_blind():
    """Any two of eight are apart in the eyes of three kinds of dichromats (Machado et al. 2009)."""
    colors = np.array([to_rgb(color) for color in figures.COLORS])
    for matrix in DICHROMATS.values():
        seen = colors @ np.transpose(matrix)
        for one, other in combinations(seen, 2):
            assert np.linalg.norm(one - other) > 0.2


def test_an_overlay_gives_a_colour_to_each_run_and_a_dash_to_each_arm():
    runs = {
        name: SimpleNamespace(
            arms=arms, labels=named(arms, "label"), metrics=make_curves(epochs, 1, arms=arms)
        )
        for name, epochs, arms in (("first", 2, TWO), ("second", 3, THREE[1:]))
    }
    lines = figures.overlay(runs).axes[0].get_lines()
    labels = ["first, with BN", "first, without BN", "second, without BN", "second, layer norm"]
    assert [line.get_label() for line in lines] == labels
    colors, dashes, markers = (
        [getattr(line, f"get_{what}")() for line in lines]
        for what in ("color", "linestyle", "marker")
    )
    assert colors[0] == colors[1] != colors[2] == colors[3]
    for found in (dashes, markers):
        assert found[1] == found[2]
        assert len(set(found)) == 3


@pytest.mark.parametrize("replicates", [1, 3])
def test_curves_draw_the_metrics(replicates):
    by_arm = make_curves(4, replicates, arms=THREE)
    axes = draw(by_arm).axes
    for panel, metric, scale in ((0, "train_cost", 1), (2, "test_accuracy", 100)):
        for arm, drawn in zip(THREE, axes[panel].get_lines(), strict=True):
            np.testing.assert_array_equal(drawn.get_xdata(), [1, 2, 3, 4])
            np.testing.assert_allclose(drawn.get_ydata(), scale * by_arm[arm][metric].mean(axis=1))
        assert len(axes[panel].collections) == (3 if replicates > 1 else 0)


@pytest.mark.parametrize("diverged", [TWO[:1], TWO])
def test_curves_bear_what_is_not_finite(diverged):
    lines = make_lines(epochs=3, replicates=2)
    for one in lines:
        if one["arm"] in diverged:
            one.update(train_cost=None, train_loss=None, test_loss=None)
    figure = draw(metrics.curves(lines, TWO))
    assert figures.to_png(figure)
    assert figures.to_svg(figure)


def test_same_numbers_same_svg():
    once, again = (figures.to_svg(draw(make_curves(4, 3))) for _ in range(2))
    other = figures.to_svg(draw(make_curves(4, 3, seed=1)))
    assert once == again != other


@pytest.mark.parametrize(
    ("sizes", "sides"), [((64, 64), (8, 8)), ((32, 5, 1), (6, 3, 1)), ((10,), (4,))]
)
def test_features_are_squares(sizes, sides):
    rng = np.random.default_rng(0)
    probes = {
        f"{arm}/features_{number}": rng.uniform(1, 2, (2, 1, size)).astype(np.float32)
        for arm in THREE
        for number, size in enumerate(sizes, start=1)
    }
    image = rng.integers(0, 256, (28, 28), np.uint8)
    figure = figures.features(image, 6, probes, STYLES)
    columns = len(sizes) + 1
    assert len(figure.axes) == 3 * columns
    for row, arm in enumerate(THREE):
        first, *layers = figure.axes[row * columns : (row + 1) * columns]
        np.testing.assert_array_equal(first.images[0].get_array(), image)
        assert first.get_ylabel() == LABELS[arm]
        for number, (axes, size, side) in enumerate(zip(layers, sizes, sides, strict=True), 1):
            drawn = np.ma.filled(axes.images[0].get_array(), np.nan)
            assert drawn.shape == (side, side)
            expected = probes[f"{arm}/features_{number}"][0, 0]
            np.testing.assert_array_equal(drawn.ravel()[:size], expected)
            assert np.isnan(drawn.ravel()[size:]).all()
    with Image.open(io.BytesIO(figures.to_png(figure))) as png:
        assert png.format == "PNG"


def test_channels_are_tiles():
    values = np.arange(24.0).reshape(2, 3, 4)
    probes = {"bn/features_1": values[None, None]}
    figure = figures.features(np.zeros((28, 28)), 6, probes, {"bn": STYLES["bn"]})
    drawn = np.asarray(figure.axes[1].images[0].get_array())
    expected = [[values[..., 0], values[..., 1]], [values[..., 2], values[..., 3]]]
    np.testing.assert_array_equal(drawn, np.block(expected))

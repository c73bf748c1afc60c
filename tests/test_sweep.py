"""A grid of paired runs."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from experiments import sweep
from experiments.lab import metrics, rundir
from experiments.lab.cells import SweepCell
from experiments.lab.presets import BOOSTCOURSE
from experiments.report import heat
from experiments.sweep import SweepConfig

GRID = "--dataset", "digits", "--epochs", "2", "--replicates", "2", "--learning-rate"


def test_cells_that_differ_in_the_rate_alone_are_together(tmp_path):
    axes = {"learning_rate": (0.1, 0.01), "batch_size": (32, 64, 128)}
    groups = SweepConfig(out=tmp_path, **axes, activation=("relu", "tanh")).groups()
    assert len(groups) == 6
    for group in groups:
        assert [one.learning_rate for one in group] == [0.1, 0.01]
        assert len({(one.activation, one.batch_size) for one in group}) == 1
    assert SweepConfig(out=tmp_path).groups()[0][0].batch_size == BOOSTCOURSE.batch_size


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"learning_rate": (0.1, 0.1)}, "learning_rate has a value twice"),
        ({"learning_rate": (-1.0,)}, "learning_rate"),
        ({"activation": ("rleu",)}, "did you mean 'relu'"),
        ({"batch_size": (0,)}, "batch_size"),
        ({"epochs": 0}, "epochs is 0"),
        ({"preset": "lab11"}, "did you mean 'lab10'"),
    ],
)
def test_mistakes(tmp_path, changes, told):
    with pytest.raises(ValueError, match=told):
        SweepConfig(out=tmp_path, **changes)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "out"
    assert sweep.main([*GRID, "0.0001", "0.01", "--out", str(path)]) == 0
    return path


def cells_of(path):
    return json.loads((path / "sweep.json").read_text())["cells"]


def test_leaves_a_page_a_picture_and_numbers(swept):
    assert {file.name for file in swept.iterdir()} == {
        *("config.json", "cells", "sweep.html", "sweep.svg", "sweep.json"),
    }
    assert [cell["learning_rate"] for cell in cells_of(swept)] == [0.0001, 0.01]
    page = (swept / "sweep.html").read_text()
    assert page.count("<tr>") > 2
    assert "points" in page


@pytest.mark.slow
def test_a_cell_does_not_depend_on_the_others(swept, tmp_path):
    """Bitwise: replicates of a CPU are trained one after the other."""
    path = tmp_path / "out"
    assert sweep.main([*GRID, "0.01", "--out", str(path)]) == 0
    (alone,) = cells_of(path)
    assert alone == cells_of(swept)[1]


def test_goes_on_where_it_stopped(swept, monkeypatch):
    before = (swept / "sweep.json").read_bytes()
    (swept / "sweep.json").unlink()
    monkeypatch.setattr(sweep, "train", None)
    assert sweep.main([*GRID, "0.0001", "0.01", "--out", str(swept)]) == 0
    assert (swept / "sweep.json").read_bytes() == before


def test_one_network_alone_has_a_page_and_no_map(tmp_path, capsys):
    path = tmp_path / "out"
    assert sweep.main([*GRID, "0.01", "--out", str(path), "--arms", "bn"]) == 0
    assert not (path / "sweep.svg").exists()
    assert "<img" not in (path / "sweep.html").read_text()
    assert re.search(r"learning rate 0.01: \d+\.\d\d ± \d+\.\d\d %\n", capsys.readouterr().out)


def test_other_settings_are_refused(swept, capsys):
    assert sweep.main([*GRID, "0.0001", "--out", str(swept)]) == 2
    assert "holds results with other settings: learning_rate was" in capsys.readouterr().err


def make_cell(activation, size, rate, **accuracies):
    """A cell whose metrics all have the values of its accuracies."""
    experiment = replace(
        BOOSTCOURSE,
        activation=activation,
        batch_size=size,
        learning_rate=rate,
        arms=tuple(accuracies),
        reference="no_bn",
    )
    values = {arm: dict.fromkeys(metrics.METRICS, one) for arm, one in accuracies.items()}
    return SweepCell(experiment, values)


def test_maps_show_every_cell():
    cells = [
        make_cell(activation, size, rate, bn=with_bn, no_bn=without)
        for activation in ("relu", "tanh")
        for size in (32, 64)
        for rate, with_bn, without in ((0.1, [0.5, 0.6], [None, None]), (0.01, [0.5], [0.25]))
    ]
    figure = heat.maps(cells, {"bn": "with BN"})
    for axes in figure.axes[:2]:
        drawn = axes.images[0]
        np.testing.assert_array_equal(np.ma.filled(drawn.get_array(), np.nan), [[25, np.nan]] * 2)
        told = [text.get_text() for text in axes.texts]
        assert told == ["+25.0", "without\nBN\ndiverged"] * 2
        red, _, blue, _ = drawn.to_rgba(np.array([25.0]))[0]
        assert blue > red, "blue where batch normalization is better"


@pytest.mark.parametrize(
    ("with_bn", "without", "told"),
    [
        ([0.5, 0.75], [0.25, 0.25], "+37.50 ± 17.68 points"),
        ([0.5, 0.75], [None, 0.25], "+50.00 points"),
        ([0.5], [None], "without BN diverged"),
        ([None], [0.5], "with BN diverged"),
        ([None], [None], "both diverged"),
        ([None, 0.5], [0.5, None], "both diverged"),
    ],
)
def test_what_a_cell_says(with_bn, without, told):
    cell = make_cell("relu", 32, 0.1, bn=with_bn, no_bn=without)
    assert cell.tell("bn") == told


@pytest.mark.parametrize(
    ("with_bn", "without", "best"),
    [
        ([0.5, 0.75], [0.5, 0.5], ["bn"]),
        ([0.5], [0.5], ["bn", "no_bn"]),
        ([None], [0.1], ["no_bn"]),
        ([None], [None], []),
    ],
)
def test_the_best_of_a_cell(with_bn, without, best):
    cell = make_cell("relu", 32, 0.1, bn=with_bn, no_bn=without)
    assert cell.best == best


def test_a_map_in_which_every_network_diverged():
    cell = make_cell("relu", 32, 0.1, bn=[None], no_bn=[None])
    figure = heat.maps([cell], {"bn": "with BN"})
    assert [text.get_text() for text in figure.axes[0].texts] == ["both\ndiverged"]


def test_three_arms_have_a_map_each_and_a_best_in_every_cell(tmp_path, capsys):
    path = tmp_path / "out"
    arms = "--arms", "layer_norm", "bn", "no_bn", "--reference", "bn"
    assert sweep.main([*GRID, "0.001", "0.01", "--out", str(path), *arms]) == 0
    told = capsys.readouterr().out
    for cell in cells_of(path):
        assert list(cell["values"]) == ["layer_norm", "bn", "no_bn"]
        assert list(cell["differences"]) == ["layer_norm", "no_bn"]
        means = {arm: np.mean(of_arm["test_accuracy"]) for arm, of_arm in cell["values"].items()}
        assert cell["best"] == [max(means, key=means.get)]
    assert told.count("best: ") == 2
    page = " ".join((path / "sweep.html").read_text().split())
    assert "With layer normalization, against with batch normalization" in page
    assert sweep.main([*GRID, "0.001", "0.01", "--out", str(path)]) == 2
    assert "holds results with other settings: arms was" in capsys.readouterr().err


@pytest.mark.parametrize(("arm", "nearest"), [("ghost_bn(20)", "16"), ("group_norm(5)", "4")])
def test_impossible_arms_are_refused_before_anything_is_trained(tmp_path, capsys, arm, nearest):
    words = ["--dataset", "digits", "--batch-size", "100", "64", "--arms", arm, "no_bn"]
    assert sweep.main([*words, "--out", str(tmp_path / "out")]) == 2
    assert f"the nearest that does is {arm.split('(')[0]}({nearest})" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "lacking"),
    [({"0.0001": {}}, "0.01"), ({}, "0.0001, 0.01"), ([], "0.0001, 0.01"), ("abc", "0.0001, 0.01")],
)
def test_cells_that_are_not_of_this_sweep(swept, capsys, content, lacking):
    file = swept / "cells" / "relu-100.json"
    before = file.read_bytes()
    file.write_text(json.dumps(content))
    try:
        assert sweep.main([*GRID, "0.0001", "0.01", "--out", str(swept)]) == 2
        told = capsys.readouterr().err
        assert f"damaged: it lacks {lacking}; delete it to train it again" in told
    finally:
        file.write_bytes(before)


def test_is_refused_while_another_sweep_has_the_directory(swept, capsys):
    before = (swept / "config.json").read_bytes()
    with rundir.locked(swept):
        assert sweep.main([*GRID, "0.0001", "0.01", "--out", str(swept)]) == 2
    assert "is in use by another process" in capsys.readouterr().err
    assert (swept / "config.json").read_bytes() == before

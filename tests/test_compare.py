"""Runs side by side: what differs, and whether replicates are pairs."""

import html
import json
import os
from dataclasses import asdict, replace

import numpy as np
import pytest
from factories import make_lines, save_run

from bnjax.statistics import paired_difference
from experiments import compare
from experiments.lab import Run, metrics, rundir
from experiments.lab.presets import BOOSTCOURSE, LAB10


def save(path, experiment, replicates=3, seed=0):
    """A run, whose metrics are drawn from a seed."""
    save_run(path, experiment, replicates)
    (path / "metrics.jsonl").unlink()
    metrics.append(path, make_lines(experiment.epochs, replicates, seed, experiment.arms))
    return path


@pytest.fixture
def two(tmp_path):
    first = save(tmp_path / "first", replace(LAB10, epochs=3), 4)
    return first, save(tmp_path / "second", replace(LAB10, epochs=2, learning_rate=0.1), 3, seed=1)


def test_what_differs(two):
    compared = {path.name: Run(path) for path in two}
    assert compare.differences(compared) == {
        "epochs": [3, 2],
        "learning_rate": [0.01, 0.1],
        "replicates": [4, 3],
    }
    assert compare.differences({"first": compared["first"]}) == {}


def test_replicates_with_the_same_seed_are_pairs(two):
    first, second = (Run(path) for path in two)
    found = compare.pair(first, second)
    ours, others = (run.metrics["bn"]["test_loss"][1, :3] for run in (first, second))
    expected = paired_difference(others, ours, lower_is_better=True)._asdict()
    assert found["bn"]["test_loss"] == expected
    assert found["bn"]["test_loss"]["n"] == 3
    assert np.isclose(expected["mean"], np.mean(others - ours))
    worth = [
        run.metrics["bn"]["test_loss"][1, :3] - run.metrics["no_bn"]["test_loss"][1, :3]
        for run in (first, second)
    ]
    assert np.isclose(found["bn minus no_bn"]["test_loss"]["mean"], np.mean(worth[1] - worth[0]))


@pytest.mark.parametrize("change", ["seed", "data"])
def test_others_are_no_pairs(two, change):
    first, second = (Run(path) for path in two)
    if change == "seed":
        second.experiment = replace(second.experiment, seed=1)
    else:
        second.config["dataset"]["sha256"] = "1" * 64
    assert compare.pair(first, second) is None


def test_what_both_have_is_compared(tmp_path):
    arms = {
        ("bn", "layer_norm", "no_bn"): "no_bn",
        ("layer_norm", "bn", "bn_after"): "bn_after",
        ("no_bn", "layer_norm"): "no_bn",
    }
    settings = [
        replace(LAB10, epochs=1, arms=of_run, reference=reference)
        for of_run, reference in arms.items()
    ]
    runs = [Run(save(tmp_path / str(k), one, seed=k)) for k, one in enumerate(settings)]
    assert list(compare.pair(*runs[:2])) == ["bn", "layer_norm"]  # held against different arms
    found = compare.pair(runs[0], runs[2])
    assert list(found) == ["layer_norm", "no_bn", "layer_norm minus no_bn"]
    worth = [
        run.metrics["layer_norm"]["test_loss"][-1] - run.metrics["no_bn"]["test_loss"][-1]
        for run in (runs[0], runs[2])
    ]
    mean = found["layer_norm minus no_bn"]["test_loss"]["mean"]
    assert np.isclose(mean, np.mean(worth[1] - worth[0]))
    other = Run(save(tmp_path / "other", replace(LAB10, epochs=1, arms=("rms_norm",))))
    assert compare.pair(runs[0], other) == {}
    compare.write(tmp_path / "out", {"first": runs[0], "other": other})
    page = " ".join((tmp_path / "out" / "compare.html").read_text().split())
    assert "other has no network in common with first" in page


def test_the_command(two, tmp_path, capsys):
    third = save(tmp_path / "third", replace(BOOSTCOURSE, epochs=2, seed=5), 2, seed=2)
    out = tmp_path / "out"
    assert compare.main([*map(str, (*two, third)), "--out", str(out)]) == 0
    assert {file.name for file in out.iterdir()} == {"compare.html", "compare.svg", "compare.json"}
    page = " ".join((out / "compare.html").read_text().split())
    assert "third has another seed or other data" in page
    assert "second minus first" in page
    assert "--preset lab10" in page
    assert page.count("<img") == 1
    saved = json.loads((out / "compare.json").read_text())
    assert saved["differences"]["learning_rate"] == [0.01, 0.1, 0.001]
    assert saved["paired"]["third"] is None
    assert f"comparison: {out / 'compare.html'}" in capsys.readouterr().out


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [save(tmp_path / parent / "run", replace(LAB10, epochs=1)) for parent in "ab"]
    assert compare.main([*map(str, paths), "--out", str(tmp_path / "out")]) == 0
    saved = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert list(saved["runs"]) == ["a/run", "b/run"]


@pytest.mark.parametrize("name", [r"a$\frac{$", "<b>&", "x" * 200, os.fsdecode(b"\xff\xfebad")])
def test_names_of_any_kind(tmp_path, name):
    paths = [save(tmp_path / one, replace(LAB10, epochs=1)) for one in (name, "other")]
    assert compare.main([*map(str, paths), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "compare.html").read_text()
    assert html.escape(name.encode(errors="replace").decode(), quote=False) in page


def test_mistakes(two, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    empty = tmp_path / "empty"
    rundir.create(empty, json.loads((two[0] / "config.json").read_text()))
    for words, told in (
        ([str(two[0])], "expected two runs or more"),
        ([str(two[0]), f"{two[0]}/../first"], "each of them once"),
        ([str(two[0]), str(tmp_path)], "is not a run directory"),
        ([str(two[0]), str(empty)], "has no epoch yet"),
        ([*map(str, two), "--out", str(tmp_path / "full")], "is not empty"),
    ):
        out = [] if "--out" in words else ["--out", str(tmp_path / "out")]
        try:
            status = compare.main([*words, *out])
        except SystemExit as stop:
            status = stop.code
        assert status == 2
        assert told in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_dataclass_of_settings_is_what_a_run_saved(two):
    assert Run(two[0]).config["experiment"] == {
        **asdict(replace(LAB10, epochs=3, replicates=4)),
        "hidden_sizes": [32, 32],
        "arms": ["bn", "no_bn"],
        "reference": "no_bn",
    }

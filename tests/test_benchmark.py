import json
from functools import partial

import jax
import numpy as np
import pytest
from factories import noise

from bnjax.data import Dataset
from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import epoch, operation, scaling, turns


def test_contenders_take_turns_and_the_first_does_not_count():
    called = []
    calls = {name: lambda name=name: called.append(name) or len(called) for name in ("a", "b")}
    assert turns.take_turns(calls, repeats=2) == {"a": [3, 5], "b": [4, 6]}
    assert called == ["a", "b"] * 3


def test_medians_are_compared():
    rows = turns.compare({"a": [1, 9, 2], "Flax": [4, 4, 4]}, "s")
    assert rows[0] == {"": "a", "s": "2", "spread": "4", "/ Flax": "0.50"}
    assert rows[1] == {"": "Flax", "s": "4", "spread": "0", "/ Flax": "1.00"}


def test_short_calls_are_repeated():
    called = []
    measure = operation.stopwatch(lambda: called.append(0))
    before = len(called)
    assert 0 < measure() < 1e-3
    assert len(called) - before > 1000


def test_every_layer_computes_the_same():
    x, gradient = np.random.default_rng(0).normal(size=(2, 20, 3)).astype(np.float32)
    calls = [operation.both_passes(layer, x, gradient) for layer in operation.LAYERS.values()]
    first, *others = (call() for call in calls)
    for other in others:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), other, first)


@pytest.mark.slow
@pytest.mark.parametrize("name", epoch.CONTENDERS)
def test_every_loop_trains(name):
    if "PyTorch" in name:
        pytest.importorskip("torch")
    with jax.numpy_rank_promotion("allow"):
        train = epoch.CONTENDERS[name](Dataset("noise", *noise(250, 30)))
        assert min(train(), train()) > 0


@pytest.mark.slow
def test_the_command_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(operation, "SIZES", ((8, 2), (16, 4)))
    few = {name: epoch.CONTENDERS[name] for name in ("Flax", "bnjax, R = 1")}
    monkeypatch.setattr(epoch, "CONTENDERS", few)
    arguments = ["--dataset", "digits", "--repeats", "2", "--json", str(tmp_path / "times.json")]
    assert benchmark.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "16 x 4" in shown
    assert "bnjax, R = 1" in shown
    found = json.loads((tmp_path / "times.json").read_text())
    assert [entry["shape"] for entry in found["operation"]] == [[8, 2], [16, 4]]
    assert {name: len(s) for name, s in found["epoch"]["seconds_per_replicate"].items()} == {
        "Flax": 2,
        "bnjax, R = 1": 2,
    }
    assert found["versions"]["jax"]


def test_a_directory_without_data_ends_with_a_sentence(tmp_path, capsys):
    arguments = ["--dataset", "mnist", "--data-dir", str(tmp_path)]
    assert benchmark.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    "arguments",
    [["--repeats", "0"], ["--json", "/nowhere/times.json"], ["--parts", "start"]],
)
def test_mistakes_are_refused_before_anything_is_measured(arguments):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(arguments)


@pytest.mark.slow
def test_steps_on_many_devices(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        scaling, "LAYOUTS", {name: one for name, one in scaling.LAYOUTS.items() if name[0] == "8"}
    )
    arguments = "--parts", "scaling", "--dataset", "digits", "--repeats", "2"
    assert benchmark.main([*arguments, "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["scaling"]["seconds_per_step"]
    assert list(found) == ["8", "8, local statistics", "8, no batch normalization"]
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in found.values())
    assert "no batch normalization" in capsys.readouterr().out

import json
import os
from functools import partial

import jax
import numpy as np
import pytest

from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import loops, operation, turns
from experiments.lab.presets import BOOSTCOURSE


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 250), ("test", 30)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, 28, 28), np.uint8)
        arrays[f"{part}_labels"] = rng.integers(0, 10, count).astype(np.int32)
    np.savez(tmp_path / "data.npz", **arrays)
    return str(tmp_path / "data.npz")


def test_contenders_take_turns():
    called = []
    calls = {name: lambda name=name: called.append(name) or len(called) for name in ("a", "b")}
    assert turns.interleave(calls, repeats=3) == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert called == ["a", "b"] * 3


def test_short_calls_are_repeated():
    called = []
    measure = operation.stopwatch(lambda: called.append(0))
    before = len(called)
    assert 0 < measure() < 1e-3
    assert len(called) - before > 1000


def test_every_contender_computes_the_same():
    x, gradient = (np.random.default_rng(k).normal(size=(20, 3)).astype("f4") for k in (0, 1))
    calls = operation.contenders(x, gradient)
    assert {"bnjax", "Flax", "Flax, two-pass variance"} <= set(calls)
    results = [call() for call in calls.values()]
    for result in results[1:]:
        for ours, theirs in zip(results[0], result, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


PYTORCH = {"pytorch": {}, "loader": {"loader": True}}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bnjax", *PYTORCH, "flax"])
def test_every_loop_trains(data, name):
    pytest.importorskip("torch" if name in PYTORCH else name)
    loop = partial(loops.pytorch, **PYTORCH[name]) if name in PYTORCH else getattr(loops, name)
    with jax.numpy_rank_promotion("allow"):
        epoch = loop(data)
        assert min(epoch(), epoch()) > 0


def test_peers_train_the_network_of_boostcourse():
    sizes = loops.HIDDEN_SIZES, loops.NUM_CLASSES, loops.BATCH_SIZE, loops.LEARNING_RATE
    one = BOOSTCOURSE
    assert sizes == (one.hidden_sizes, one.num_classes, one.batch_size, one.learning_rate)


@pytest.mark.slow
def test_each_contender_has_its_own_process():
    make = partial(partial, os.getpid)
    with turns.own_process("a", make) as a, turns.own_process("b", make) as b:
        found = turns.interleave({"a": a, "b": b}, repeats=2)
    assert len({os.getpid(), *found["a"], *found["b"]}) == 3
    assert found["a"][0] == found["a"][1]


def test_a_contender_that_fails_is_named():
    broken = turns.own_process("broken", partial(loops.bnjax, "nowhere"))
    with pytest.raises(RuntimeError, match="broken failed"):
        broken.__enter__()


@pytest.mark.slow
def test_the_command_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(operation, "SIZES", ((8, 2), (16, 4)))
    monkeypatch.setattr(benchmark, "REPLICATES", (1,))
    monkeypatch.setattr(benchmark, "PEERS", {"Flax loop": ("flax", loops.flax)})
    arguments = ["--parts", "operation", "epoch", "--dataset", "digits", "--repeats", "1"]
    assert benchmark.main([*arguments, "--json", str(tmp_path / "times.json")]) == 0
    shown = capsys.readouterr().out
    assert "16 x 4" in shown
    assert "bnjax, R = 1" in shown
    found = json.loads((tmp_path / "times.json").read_text())
    assert [entry["shape"] for entry in found["operation"]] == [[8, 2], [16, 4]]
    assert len(found["epoch"]["seconds_per_replicate"]["Flax loop"]) == 1
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

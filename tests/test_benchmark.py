import json
import sys
from itertools import pairwise

import jax
import numpy as np
import pytest

from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import loops, operation, turns
from experiments.benchmark.loops import Job


@pytest.fixture
def job(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 90), ("test", 30)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, 28, 28), np.uint8)
        arrays[f"{part}_labels"] = rng.integers(0, 10, count).astype(np.int32)
    np.savez(tmp_path / "data.npz", **arrays)
    return Job(str(tmp_path / "data.npz"), (6, 5), 10, batch_size=20)


def test_contenders_take_turns_and_short_calls_are_repeated():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in ("a", "b")}
    seconds = operation.measure(calls, repeats=3)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert all(value > 0 for values in seconds.values() for value in values)
    changes = sum(one != other for one, other in pairwise(called))
    assert changes == 7  # a and b once to see how long they take, then three rounds
    assert len(called) > 1000


def test_table_shows_medians_spread_and_ratios():
    seconds = {"bnjax": [3e-3, 1e-3, 2e-3], "Flax": [4e-3, 4e-3, 4e-3]}
    table = operation.table({(100, 32): seconds})
    columns = [list(column.cells) for column in table.columns]
    assert columns == [
        ["100 x 32", ""],
        ["bnjax", "Flax"],
        ["2", "4"],
        ["1", "0"],
        ["0.50", "1.00"],
    ]


def test_every_contender_computes_the_same():
    x, gradient = (np.random.default_rng(k).normal(size=(20, 3)).astype("f4") for k in (0, 1))
    calls = operation.contenders(x, gradient)
    assert {"bnjax", "Flax", "Flax, two-pass variance"} <= set(calls)
    results = [call() for call in calls.values()]
    for result in results[1:]:
        for ours, theirs in zip(results[0], result, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module", [None, "torch", "torch-loader", "flax", "keras"])
def test_every_loop_trains_and_evaluates(job, module, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    loop = {
        "torch": loops.pytorch,
        "torch-loader": loops.pytorch_loader,
        "flax": loops.flax,
        "keras": loops.keras,
    }.get(module, loops.bnjax)
    if module is not None:
        pytest.importorskip(module.split("-")[0])
    with jax.numpy_rank_promotion("allow"):
        call = loop(job)
        assert min(*call(), *call()) > 0


@pytest.mark.slow
def test_each_contender_has_its_own_process(job):
    contenders = {
        name: (loops.bnjax, job._replace(replicates=r)) for name, r in (("a", 1), ("b", 2))
    }
    seconds = turns.alternate(contenders, repeats=2)
    assert {name: np.shape(values) for name, values in seconds.items()} == {
        "a": (2, 2),
        "b": (2, 2),
    }


def test_a_contender_that_fails_is_named(job):
    with pytest.raises(RuntimeError, match="broken failed"):
        turns.alternate({"broken": (loops.bnjax, job._replace(data="nowhere"))}, repeats=1)


def test_operations_are_those_of_the_matrix_products(job):
    forward = 2 * 784 * 6 + 2 * 6 * 5 + 2 * 5 * 10
    first = 2 * 784 * 6
    assert benchmark.flops_per_epoch(job) == 2 * 80 * (3 * forward - first)


def test_a_command_is_watched_from_its_start():
    code = "import time; time.sleep(0.2); print('1/15', flush=True); time.sleep(0.2)"
    found = benchmark._watch([sys.executable, "-c", code], {})
    assert 0.2 < found["first_epoch"] < found["total"] - 0.15
    assert found["ready"] is None
    with pytest.raises(RuntimeError, match="failed"):
        benchmark._watch([sys.executable, "-c", "raise SystemExit(3)"], {})


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
    assert len(found["epoch"]["seconds_per_replicate"]["Flax loop"]["train"]) == 1
    assert found["versions"]["jax"]
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments", [["--repeats", "0"], ["--json", "/nowhere/times.json"]])
def test_mistakes_are_refused_before_anything_is_measured(arguments):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(arguments)


def test_a_cold_cache_keeps_the_data_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    for name in ("programs", "mnist"):
        (tmp_path / "user" / "bnjax" / name).mkdir(parents=True)
    cold = benchmark._cold_cache(tmp_path / "cold")
    assert [entry.name for entry in (cold / "bnjax").iterdir()] == ["mnist"]


def test_a_picture_is_no_place_for_numbers(tmp_path):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["--json", str(tmp_path / "times.png")])

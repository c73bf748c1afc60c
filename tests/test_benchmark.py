import json
from itertools import pairwise

import numpy as np
import pytest

from experiments import benchmark


def test_contenders_take_turns_and_short_calls_are_repeated():
    turns = []
    calls = {name: lambda name=name: turns.append(name) for name in ("a", "b")}
    seconds = benchmark.measure(calls, repeats=3)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert all(value > 0 for values in seconds.values() for value in values)
    changes = sum(one != other for one, other in pairwise(turns))
    assert changes == 7  # a and b once to see how long they take, then three rounds
    assert len(turns) > 1000


def test_table_shows_medians_spread_and_ratios(capsys):
    seconds = {"bnjax": [3e-3, 1e-3, 2e-3], "Flax": [4e-3, 4e-3, 4e-3]}
    table = benchmark.table({(100, 32): seconds})
    columns = [list(column.cells) for column in table.columns]
    assert columns == [
        ["100 x 32", ""],
        ["bnjax", "Flax"],
        ["2", "4"],
        ["1", "0"],
        ["0.50", "1.00"],
    ]


def test_every_contender_computes_the_same(monkeypatch):
    x, gradient = (np.random.default_rng(k).normal(size=(20, 3)).astype("f4") for k in (0, 1))
    calls = benchmark.contenders(x, gradient)
    assert {"bnjax", "Flax", "Flax, two-pass variance"} <= set(calls)
    results = [call() for call in calls.values()]
    for result in results[1:]:
        for ours, theirs in zip(results[0], result, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_command_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "SIZES", ((8, 2), (16, 4)))
    benchmark.main(["--repeats", "2", "--json", str(tmp_path / "times.json")])
    assert "16 x 4" in capsys.readouterr().out
    found = json.loads((tmp_path / "times.json").read_text())
    assert [entry["shape"] for entry in found["operation"]] == [[8, 2], [16, 4]]
    assert all(len(times) == 2 for times in found["operation"][0]["seconds"].values())
    assert found["versions"]["jax"]


def test_no_repeats_are_refused():
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["--repeats", "0"])

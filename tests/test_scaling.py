"""What is counted of many devices."""

import json

import jax
import numpy as np
import pytest

from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import scaling
from experiments.benchmark.scaling import Layout, Traffic


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("%a = f32[16]{0} all-reduce(f32[16]{0} %x), channel_id=1", Traffic(1, 64)),
        ("%a = (f32[2,3]{1,0}, s32[]) all-reduce(%x, %y)", Traffic(1, 28)),
        ("%a = f64[4]{0} all-gather-start(%x)\n%b = bf16[4]{0} all-to-all(%a)", Traffic(2, 40)),
        ("%a = f32[16]{0} all-reduce-done(%x)\n%b = f32[3]{0} add(%a, %all-reduce.3)", (0, 0)),
    ],
)
def test_traffic(text, expected):
    assert scaling.traffic(text) == expected


def test_one_device_communicates_nothing():
    program = jax.jit(lambda x: x.sum()).lower(np.ones(4, np.float32)).compile().as_text()
    assert scaling.traffic(program) == (0, 0)


@pytest.mark.slow
def test_the_command(monkeypatch, tmp_path, capsys):
    layouts = Layout(1, 8), Layout(1, 8, "local"), Layout(2, 2)
    monkeypatch.setattr(scaling, "LAYOUTS", layouts)
    arguments = "--parts", "scaling", "--repeats", "2", "--json", str(tmp_path / "found.json")
    assert benchmark.main(arguments) == 0
    found = json.loads((tmp_path / "found.json").read_text())["scaling"]
    assert [(row["processes"], row["devices"], row["network"]) for row in found] == [*layouts]
    assert [row["operations"] for row in found] == [7, 2, 7]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in found)
    # Weights and biases of three layers, scale, offset and six sums of two, losses; 4 bytes each.
    weights = 784 * 32 + 32 + 32 * 32 + 32 + 32 * 512 + 512
    assert found[0]["bytes"] == pytest.approx(4 * (weights + 2 * 32 * (2 + 6)), rel=0.01)
    assert "all-reduces" in capsys.readouterr().out

"""Cores become devices up to a limit, and numbers do not depend on how many there are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import lines_of

from experiments.claims import verdicts

COMMANDS = """
import sys
from experiments import mnist_bn, reproduce, sweep
from experiments.report import figures
figures.to_png = figures.to_svg = lambda _: b""  # nothing here looks at pictures
data, out = ("--dataset", "digits"), sys.argv[1]
small = ("--hidden-sizes", "8", "8", "--epochs", "2", "--no-progress")
rates = ("--learning-rate", "0.001", "0.01", "--epochs", "1", "--replicates", "1")
assert not any((
    mnist_bn.main([*data, *small, "--out", f"{out}/one"]),
    mnist_bn.main([*data, *small, "--replicates", "3", "--out", f"{out}/three"]),
    sweep.main([*data, *rates, "--out", f"{out}/sweep"]),
    reproduce.main(["boostcourse-costs", *data, "--replicates", "1", "--out", f"{out}/claims"]),
))
"""
ONE_CORE = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
CORES = "import os; os.sched_getaffinity = lambda process: range({})"


def run(code: str, *words: object, count: int | None = None, **surroundings: str) -> str:
    """What a program says that starts where there are so many devices, or as many as it opens."""
    flags = f"--xla_force_host_platform_device_count={count}" if count else ""
    ended = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        env={**os.environ, "XLA_FLAGS": flags, **surroundings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def numbers(path: Path, code: str = COMMANDS, count: int | None = None) -> dict[str, object]:
    """What the commands compute: the lines of runs, the cells of a sweep, a claim's evidence."""
    run(code, path, count=count, XDG_CACHE_HOME=str(path / "cache"))
    evidence = json.loads((path / "claims" / "boostcourse-costs" / verdicts.EVIDENCE).read_text())
    return {
        **{name: lines_of(path / name) for name in ("one", "three")},
        "sweep": json.loads((path / "sweep" / "sweep.json").read_text()),
        "claim": [evidence[part] for part in ("measured", "picture")],
    }


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    return numbers(tmp_path_factory.mktemp("one"), count=1)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 8])
def test_commands_compute_bitwise_the_same_on_any_devices(on_one_device, tmp_path, count):
    assert numbers(tmp_path, count=count) == on_one_device


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes have all cores")
def test_commands_compute_bitwise_the_same_on_a_single_core(on_one_device, tmp_path):
    assert numbers(tmp_path, ONE_CORE + COMMANDS) == on_one_device


@pytest.mark.parametrize(("cores", "devices"), [(3, 3), (100, 64)])
@pytest.mark.parametrize("asked", ["", pytest.param("200", marks=pytest.mark.slow)])
def test_cores_become_devices_up_to_a_limit(cores, devices, asked):
    code = (
        f"import jax; from experiments.lab.devices import set_cpu_devices; set_cpu_devices({asked})"
    )
    found = run(f"{CORES.format(cores)}; {code}; print(jax.device_count())")
    assert int(found) == (64 if asked else devices)


def test_a_mesh_beyond_the_limit_is_refused():
    words = "--dataset", "digits", "--mesh", "replicate=128"
    code = "import sys; from experiments import mnist_bn; assert mnist_bn.main(sys.argv[1:]) == 2"
    told = run(code, *words)
    assert "mesh replicate=128,data=1 needs 128 devices, found 64" in " ".join(told.split())

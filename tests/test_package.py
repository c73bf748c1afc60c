"""What holds for the package as a whole."""

import subprocess
import sys

import pytest


def loaded_by(statement):
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in result.stdout.split()}


@pytest.mark.parametrize("module", ["bnjax", "experiments.mnist_bn"])
def test_heavy_imports_wait_until_they_are_used(module):
    heavy = {"tensorflow_datasets", "matplotlib", "sklearn", "orbax", "PIL", "tensorflow"}
    assert not heavy & loaded_by(f"import {module}")


@pytest.mark.parametrize("module", ["bnjax", "experiments.mnist_bn"])
def test_importing_starts_no_device(module):
    code = (
        f"import {module}\nfrom jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

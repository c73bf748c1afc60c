"""Speed beside that of peers, measured in one sitting.

    python -m experiments.benchmark --data-dir DIR --json benchmark.json
    python -m experiments.benchmark --scaling

Three parts: the operation (batch normalization, forward and backward), the paired epoch of the
preset boostcourse, and the whole command from its start. Peers take part where they are installed:
pip install '.[bench]'. Contenders take turns, those of the epoch each in a process of its own;
medians are compared, and the spread is the distance of the quartiles. It takes some ten minutes.
"""

import importlib.util
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.benchmark import loops, operation, scaling
from experiments.benchmark.turns import interleave, own_process, timing
from experiments.lab import exits, plan, rundir
from experiments.lab.console import print_plain

REPLICATES = (1, 2, 8, 32)
EPOCHS = 15
PEERS = {
    "PyTorch": ("torch", loops.pytorch),
    "PyTorch loader": ("torch", partial(loops.pytorch, loader=True)),
    "Flax loop": ("flax", loops.flax),
    "Keras on JAX": ("keras", loops.keras),
}


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    parts: tuple[Literal["operation", "epoch", "start"], ...] = ("operation", "epoch", "start")
    """Which parts to run."""

    dataset: str = "auto"
    """auto, mnist, fashion_mnist, kmnist or digits; auto is MNIST where it can be had."""

    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where the dataset's IDX files are."""

    scaling: bool = False
    """Measure instead how a step scales over virtual devices and processes of the CPU."""

    repeats: int = 7
    """Measurements of each contender."""

    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File to write all measurements to; a picture appears beside it."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}: expected at least 1")
        path = self.json
        if path and (not path.parent.is_dir() or path.is_dir() or path.suffix == ".png"):
            raise ValueError(f"{path} cannot hold the measurements: choose another for --json")


class Part(NamedTuple):
    """A table, and how to measure what it shows."""

    title: str
    run: Callable[[], Any]
    rows: Callable[[Any], Iterable[Mapping[str, str]]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints tables, and writes the measurements where they were asked for."""
    settings = tyro.cli(
        Settings, args=arguments, prog="python -m experiments.benchmark", description=__doc__
    )
    # All contenders are there at once: none may take a whole accelerator's memory, or use TF32.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "float32")
    return exits.run(lambda _: _measure(settings, Console()))


def _measure(settings: Settings, console: Console) -> int:
    found = rundir.provenance()
    with tempfile.TemporaryDirectory() as scratch:
        for name, part in _parts(settings, Path(scratch), console).items():
            found[name] = part.run()
            _print(part.title, list(part.rows(found[name])), console)
            if settings.json:
                rundir.write_json(settings.json, found)
    if settings.json and "epoch" in found:
        from experiments.report import figures

        picture = settings.json.with_suffix(".png")
        rundir.write_bytes(picture, figures.to_png(figures.benchmark(found["epoch"])))
        print_plain(console, f"picture: {picture}")
    return 0


def _parts(settings: Settings, scratch: Path, console: Console) -> dict[str, Part]:
    repeats = settings.repeats
    if settings.scaling:
        title = f"A step of boostcourse on a batch of {scaling.BATCH}, spread over devices"
        return {"scaling": Part(title, partial(scaling.run, repeats), scaling.rows)}
    with exits.user_errors():
        name, *arrays = plan.load_data(settings.dataset, settings.data_dir, console)
    data = str(scratch / "data.npz")
    np.savez(data, *arrays)
    title = "Batch normalization, forward and backward"
    parts = {
        "operation": Part(title, partial(operation.run, 2 * repeats), operation.rows),
        "epoch": Part(
            "Paired epoch of boostcourse, per replicate",
            partial(run_epochs, data, repeats),
            epoch_rows,
        ),
        "start": Part(
            f"The whole command, {EPOCHS} epochs: seconds until",
            partial(_run_commands, data, settings, scratch / "run"),
            _start_rows,
        ),
    }
    return {name: parts[name] for name in settings.parts}

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
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.benchmark import loops, operation, scaling
from experiments.benchmark.loops import Epoch
from experiments.benchmark.turns import Part, interleave, own_process, timing
from experiments.lab import exits, plan, rundir
from experiments.lab.console import print_plain

REPLICATES = (1, 2, 8, 32)
EPOCHS = 15
PEERS: dict[str, tuple[str, Callable[[str], Epoch]]] = {
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints tables, and writes the measurements where they were asked for."""
    settings = tyro.cli(
        Settings, args=arguments, prog="python -m experiments.benchmark", description=__doc__
    )
    # All contenders are there at once: none may take a whole accelerator's memory, or use TF32.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "float32")
    return exits.run(lambda _: _measure(settings, Console()), list)


def _measure(settings: Settings, console: Console) -> int:
    found = rundir.provenance()
    with tempfile.TemporaryDirectory() as scratch:
        for name, part in _parts(settings, Path(scratch), console).items():
            found[name], title, rows = part()
            _print(console, title, rows)
            if settings.json:
                rundir.write_json(settings.json, found)
    if settings.json and "epoch" in found:
        from experiments.report import figures

        picture = settings.json.with_suffix(".png")
        rundir.write_bytes(picture, figures.to_png(figures.benchmark(found["epoch"])))
        print_plain(console, f"picture: {picture}")
    return 0


def _parts(settings: Settings, scratch: Path, console: Console) -> dict[str, Callable[[], Part]]:
    repeats = settings.repeats
    if settings.scaling:
        return {"scaling": partial(scaling.run, repeats)}
    with exits.user_errors():
        dataset = plan.load_data(settings.dataset, settings.data_dir, console)
    data = str(scratch / "data.npz")
    np.savez(data, **dataset._asdict())
    parts = {
        "operation": partial(operation.run, 2 * repeats),
        "epoch": partial(_epoch, data, repeats),
        "start": partial(_start, data, settings, scratch / "run"),
    }
    return {name: parts[name] for name in settings.parts}


def _print(console: Console, title: str, rows: Sequence[Mapping[str, str]]) -> None:
    table = Table(title=title)
    for heading in rows[0]:
        table.add_column(heading, justify="right" if table.columns else "left")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def _epoch(data: str, repeats: int) -> Part:
    makers: dict[str, Callable[[], Epoch]] = {
        name: partial(make, data)
        for name, (module, make) in PEERS.items()
        if importlib.util.find_spec(module)
    }
    ours = {f"bnjax, R = {r}": r for r in REPLICATES}
    makers |= {name: partial(loops.bnjax, data, r) for name, r in ours.items()}
    with ExitStack() as stack:
        calls = {n: stack.enter_context(own_process(n, make)) for n, make in makers.items()}
        found = interleave(calls, repeats)
    seconds = {name: [s / ours.get(name, 1) for s in of_all] for name, of_all in found.items()}
    floor = flops_per_epoch(data) / matmul_rate()
    baseline = "PyTorch" if "PyTorch" in seconds else "Flax loop"
    rows = [
        {
            "": name,
            **timing(train, "s"),
            f"/ {baseline}": f"{median(train) / median(seconds[baseline]):.3f}",
            "/ products": f"{median(train) / floor:.2f}",
        }
        for name, train in {**seconds, "matrix products": [floor]}.items()
    ]
    per_replicate = {name: {"train": train} for name, train in seconds.items()}
    result = {"seconds_per_replicate": per_replicate, "floor": floor, "baseline": baseline}
    return result, "Paired epoch of boostcourse, per replicate", rows


def flops_per_epoch(data: str) -> float:
    """Floating point operations of the matrix products of one paired epoch."""
    images, _ = loops.load(data)[0]
    sizes = (images[0].size, *loops.HIDDEN_SIZES, loops.NUM_CLASSES)
    products = [2 * a * b for a, b in pairwise(sizes)]
    examples = len(images) // loops.BATCH_SIZE * loops.BATCH_SIZE
    # Forward, gradient of the kernel and, but for the first layer, gradient of the input.
    return 2 * examples * (3 * sum(products) - products[0])


def matmul_rate(size: int = 2048) -> float:
    """Floating point operations per second of a large float32 product on this machine."""
    product = jax.jit(partial(jnp.dot, precision="float32"))
    x = jnp.ones((size, size))
    measure = operation.stopwatch(lambda: product(x, x).block_until_ready())
    return 2 * size**3 / median(measure() for _ in range(7))


def _start(data: str, settings: Settings, run: Path) -> Part:
    warm = [sys.executable, "-m", "experiments.mnist_bn", "--dataset", settings.dataset]
    if settings.data_dir:
        warm += ["--data-dir", str(rundir.expand(settings.data_dir).absolute())]
    warm += ["--epochs", f"{EPOCHS}", "--out", str(run)]
    cold = [*warm, "--no-cache"]
    commands = {
        "bnjax, cold": cold,
        "bnjax, warm": warm,
        "bnjax, cold, 8 replicates": [*cold, "--replicates", "8"],
    }
    if importlib.util.find_spec("torch"):
        script = [sys.executable, "-m", "experiments.benchmark.loops", data, f"{EPOCHS}"]
        commands["PyTorch script"] = script

    def call(command: Sequence[str]) -> dict[str, float]:
        shutil.rmtree(run, ignore_errors=True)
        return watch(command)

    call(warm)  # leaves its programs in the cache
    calls = {name: partial(call, command) for name, command in commands.items()}
    found = interleave(calls, math.ceil(settings.repeats / 2))
    rows = [
        {
            "": name,
            "first epoch": f"{median(one['first_epoch'] for one in times):.3g}",
            **timing([one["total"] for one in times], "s"),
        }
        for name, times in found.items()
    ]
    return found, f"The whole command, {EPOCHS} epochs: seconds to the first and to the end", rows


def watch(command: Sequence[str]) -> dict[str, float]:
    """Seconds until a command shows its first epoch, and until its end.

    Raises:
        UserError: if it fails, having said why.
    """
    found, start = {}, time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if line.startswith("1/"):
                found["first_epoch"] = time.perf_counter() - start
    if process.returncode:
        raise exits.UserError(f"{shlex.join(command)} failed with status {process.returncode}")
    return {**found, "total": time.perf_counter() - start}


if __name__ == "__main__":
    exits.leave(main())

"""Speed beside that of peers, measured in one sitting.

    python -m experiments.benchmark --data-dir DIR --json benchmark.json
    python -m experiments.benchmark --scaling

Three parts: the operation (batch normalization, forward and backward), the paired epoch of the
preset boostcourse, and the whole command from its start. Peers take part where
they are installed: pip install '.[bench]'. Contenders take turns, each in a process of its own;
medians are compared, and the spread is the distance of the quartiles. It takes some ten minutes.
"""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from bnjax.data import cache_directory
from experiments.benchmark import loops, operation
from experiments.benchmark.loops import Job
from experiments.benchmark.operation import spread
from experiments.benchmark.turns import Make, alternate
from experiments.lab import rundir
from experiments.lab.console import print_plain

REPLICATES = (1, 2, 8, 32)
EPOCHS = 15
PEERS = {
    "PyTorch": ("torch", loops.pytorch),
    "PyTorch loader": ("torch", loops.pytorch_loader),
    "Flax loop": ("flax", loops.flax),
    "Keras on JAX": ("keras", loops.keras),
}
Part = Literal["operation", "epoch", "start"]


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    parts: tuple[Part, ...] = ("operation", "epoch", "start")
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
        if self.json is not None and (not self.json.parent.is_dir() or self.json.is_dir()):
            raise ValueError(f"{self.json} cannot be a file: choose another for --json")
        if self.json is not None and self.json.suffix == ".png":
            raise ValueError(f"{self.json} is the name of a picture: choose another for --json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints tables, and writes the measurements where they were asked for."""
    settings = tyro.cli(
        Settings, args=arguments, prog="python -m experiments.benchmark", description=__doc__
    )
    console = Console()
    if settings.scaling:
        return _scaling(settings, console)
    # All contenders are there at once: none may take a whole accelerator's memory, or use TF32.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "float32")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            data = _save_data(settings, Path(scratch), console)
        except ValueError as error:
            print_plain(Console(stderr=True), f"error: {error}")
            return 2
        parts: dict[str, Callable[[], tuple[Any, Table]]] = {
            "operation": lambda: _operation(settings.repeats),
            "epoch": lambda: _epoch(data, settings.repeats),
            "start": lambda: _start(data, settings, Path(scratch)),
        }
        found: dict[str, Any] = rundir.provenance()
        for part in settings.parts:
            found[part], table = parts[part]()
            console.print(table)
            if settings.json is not None:
                rundir.write_json(settings.json, found)
    if settings.json is not None and "epoch" in found:
        from experiments.report import figures

        picture = settings.json.with_suffix(".png")
        rundir.write_bytes(picture, figures.to_png(figures.benchmark(found["epoch"])))
        print_plain(console, f"picture: {picture}")
    return 0


def _scaling(settings: Settings, console: Console) -> int:
    from experiments.benchmark import scaling

    found = scaling.run(settings.repeats)
    console.print(scaling.table(found))
    if settings.json is not None:
        rundir.write_json(settings.json, {**rundir.provenance(), "scaling": found})
    return 0


def _save_data(settings: Settings, scratch: Path, console: Console) -> str:
    from experiments.lab.plan import load_data

    dataset = load_data(settings.dataset, settings.data_dir, console)
    arrays = {
        f"{part}_{kind}": np.asarray(getattr(dataset, f"{part}_{kind}"))
        for part in ("train", "test")
        for kind in ("images", "labels")
    }
    rundir.write_arrays(scratch / "data.npz", arrays)
    return str(scratch / "data.npz")


def _operation(repeats: int) -> tuple[Any, Table]:
    sizes = operation.run(2 * repeats)
    return [{"shape": shape, "seconds": s} for shape, s in sizes.items()], operation.table(sizes)


def _epoch(data: str, repeats: int) -> tuple[Any, Table]:
    contenders: dict[str, tuple[Make, Job]] = {
        name: (make, Job(data))
        for name, (module, make) in PEERS.items()
        if importlib.util.find_spec(module)
    }
    contenders |= {f"bnjax, R = {r}": (loops.bnjax, Job(data, replicates=r)) for r in REPLICATES}
    seconds = alternate(contenders, repeats)
    replicates = {name: job.replicates for name, (_, job) in contenders.items()}
    floor = flops_per_epoch(Job(data)) / matmul_rate()
    rows = {
        name: {
            "train": [train / replicates[name] for train, _ in values],
            "evaluation": [evaluation / replicates[name] for _, evaluation in values],
        }
        for name, values in seconds.items()
    }
    baseline = "PyTorch" if "PyTorch" in rows else "Flax loop"
    table = _table(
        "Paired epoch of boostcourse, per replicate",
        *("seconds", "spread", f"/ {baseline}", "/ products", "evaluation"),
    )
    reference = median(rows[baseline]["train"])
    for name, row in rows.items():
        train = median(row["train"])
        table.add_row(
            name,
            f"{train:.3f}",
            f"{spread(row['train']):.3f}",
            f"{train / reference:.3f}",
            f"{train / floor:.2f}",
            f"{median(row['evaluation']):.3f}",
        )
    table.add_row("matrix products", f"{floor:.3f}")
    return {"seconds_per_replicate": rows, "floor": floor, "baseline": baseline}, table


def flops_per_epoch(job: Job) -> float:
    """Floating point operations of the matrix products of one paired epoch."""
    images = np.load(job.data)["train_images"]
    sizes = (images[0].size, *job.hidden_sizes, job.num_classes)
    products = [2 * a * b for a, b in pairwise(sizes)]
    examples = len(images) // job.batch_size * job.batch_size
    # Forward, gradient of the kernel and, but for the first layer, gradient of the input.
    return 2 * examples * (3 * sum(products) - products[0])


def matmul_rate(size: int = 2048) -> float:
    """Floating point operations per second of a large float32 product on this machine."""
    import jax
    import jax.numpy as jnp

    product = jax.jit(partial(jnp.dot, precision="float32"))
    x = jnp.ones((size, size))
    times = operation.measure({"": lambda: product(x, x).block_until_ready()}, 7)[""]
    return 2 * size**3 / median(times)


def _start(data: str, settings: Settings, scratch: Path) -> tuple[Any, Table]:
    ours = [sys.executable, "-m", "experiments.mnist_bn", "--dataset", settings.dataset]
    if settings.data_dir is not None:
        ours += ["--data-dir", str(settings.data_dir.expanduser().absolute())]
    ours += ["--epochs", f"{EPOCHS}", "--out", str(scratch / "run")]
    commands = {"bnjax, cold": ours, "bnjax, warm": ours}
    commands["bnjax, 8 replicates"] = [*ours, "--replicates", "8"]
    if importlib.util.find_spec("torch"):
        job = json.dumps(Job(data)._asdict())
        script = [sys.executable, "-m", "experiments.benchmark.loops", job, f"{EPOCHS}"]
        commands["PyTorch script"] = script
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for repeat in range(math.ceil(settings.repeats / 2)):
        cache = {**os.environ, "XDG_CACHE_HOME": str(_cold_cache(scratch / f"cache-{repeat}"))}
        for name, command in commands.items():
            found[name].append(_watch(command, cache))
            shutil.rmtree(scratch / "run", ignore_errors=True)
    table = _table(
        f"The whole command, {EPOCHS} epochs: seconds until",
        *("data loaded", "first epoch shown", "end", "spread"),
    )
    for name, measured in found.items():
        ready, first, total = ([m[key] for m in measured] for key in measured[0])
        table.add_row(
            name,
            *("-" if None in s else f"{median(s):.1f}" for s in (ready, first, total)),
            f"{spread(total):.1f}",
        )
    return found, table


def _cold_cache(path: Path) -> Path:
    """A cache with the downloaded data, but without compiled programs."""
    (path / "bnjax").mkdir(parents=True)
    kept = cache_directory()
    for entry in kept.iterdir() if kept and kept.is_dir() else ():
        if entry.name != "programs":
            (path / "bnjax" / entry.name).symlink_to(entry.absolute())
    return path


def _watch(command: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Seconds until a command is ready to train, its first epoch and its end.

    What it does not tell of is None.
    """
    start = time.perf_counter()
    found: dict[str, Any] = dict.fromkeys(("ready", "first_epoch", "total"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout or ():
            for name, beginning in (("ready", "run directory"), ("first_epoch", "1/")):
                if line.startswith(beginning):
                    found[name] = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed")
    return {**found, "total": time.perf_counter() - start}


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title)
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


if __name__ == "__main__":
    sys.exit(main())

"""Speed beside that of peers, measured in one sitting.

    python -m experiments.benchmark --data-dir DIR --json benchmark.json
    python -m experiments.benchmark --parts scaling

Three parts: the operation (batch normalization, forward and backward), the paired epoch of the
preset boostcourse, and, where asked for, how a step scales over virtual devices and processes of
the CPU. Peers take part where they are installed: pip install '.[bench]'. Contenders take turns,
those of the epoch each in a process of its own; medians are compared, and the spread is the
distance of the quartiles. It takes some five minutes.
"""

import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.benchmark import loops, operation, scaling
from experiments.benchmark.loops import Epoch
from experiments.benchmark.turns import Part, interleave, own_process, timing
from experiments.lab import exits, plan, rundir

REPLICATES = (1, 2, 8, 32)
PEERS: dict[str, tuple[str, Callable[[str], Epoch]]] = {
    "PyTorch": ("torch", loops.pytorch),
    "PyTorch loader": ("torch", partial(loops.pytorch, loader=True)),
    "Flax loop": ("flax", loops.flax),
}


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    parts: tuple[Literal["operation", "epoch", "scaling"], ...] = ("operation", "epoch")
    """Which parts to run."""

    dataset: str = "auto"
    """auto, mnist, fashion_mnist, kmnist or digits; auto is MNIST where it can be had."""

    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where the dataset's IDX files are."""

    repeats: int = 7
    """Measurements of each contender."""

    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File to write all measurements to."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}: expected at least 1")
        if (path := self.json) and (not path.parent.is_dir() or path.is_dir()):
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
        data = str(Path(scratch) / "data.npz")
        if "epoch" in settings.parts:
            with exits.user_errors():
                dataset = plan.load_data(settings.dataset, settings.data_dir, console)
            np.savez(data, **dataset._asdict())
        parts: dict[str, Callable[[], Part]] = {
            "operation": partial(operation.run, 2 * settings.repeats),
            "epoch": partial(_epoch, data, settings.repeats),
            "scaling": partial(scaling.run, settings.repeats),
        }
        for name in settings.parts:
            found[name], title, rows = parts[name]()
            _print(console, title, rows)
            if settings.json:
                rundir.write_json(settings.json, found)
    return 0


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
    baseline = "PyTorch" if "PyTorch" in seconds else "Flax loop"
    rows = [
        {
            "": name,
            **timing(train, "s"),
            f"/ {baseline}": f"{median(train) / median(seconds[baseline]):.3f}",
        }
        for name, train in seconds.items()
    ]
    result = {"seconds_per_replicate": seconds, "baseline": baseline}
    return result, "Paired epoch of boostcourse, per replicate", rows


if __name__ == "__main__":
    exits.leave(main())

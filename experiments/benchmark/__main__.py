"""Speed beside that of peers, measured in one sitting.

    python -m experiments.benchmark --data-dir DIR --json benchmark.json
    python -m experiments.benchmark --parts scaling

Three parts: the paired epoch of the preset boostcourse, beside Flax and PyTorch where that is
installed (pip install '.[bench]'); the operation, batch normalization forward and backward, beside
Flax's; and how a step scales over virtual devices of the CPU. Contenders take turns; medians are
compared, and the spread is the distance of the quartiles.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from experiments.benchmark import epoch, operation, scaling
from experiments.benchmark.turns import Part
from experiments.lab import exits, plan, rundir


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    parts: tuple[Literal["epoch", "operation", "scaling"], ...] = ("epoch", "operation")
    """Which parts to run."""

    dataset: str = "auto"
    """To train on: auto, mnist, fashion_mnist, kmnist or digits; auto is MNIST if it is there."""

    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where the dataset's IDX files are."""

    repeats: int = 7
    """Measurements of each contender."""

    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File to write all measurements to."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}: expected at least 1")
        if self.json and (not self.json.parent.is_dir() or self.json.is_dir()):
            raise ValueError(f"{self.json} cannot hold the measurements: choose another for --json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints tables, and writes the measurements where they were asked for."""
    settings = tyro.cli(
        Settings, args=arguments, prog="python -m experiments.benchmark", description=__doc__
    )
    # All contenders are there at once: none may take a whole accelerator's memory, or use TF32.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "float32")
    return exits.run(lambda _: _measure(settings, Console()))


def _measure(settings: Settings, console: Console) -> None:
    parts: dict[str, Callable[[int], Part]] = {"operation": operation.run}
    if {"epoch", "scaling"} & {*settings.parts}:
        with exits.user_errors():
            dataset = plan.load_data(settings.dataset, settings.data_dir, console)
            dataclasses.replace(epoch.PRESET, batch_size=scaling.BATCH).check_against(dataset)
        parts |= {"epoch": partial(epoch.run, dataset), "scaling": partial(scaling.run, dataset)}
    found = rundir.provenance()
    for name in settings.parts:
        found[name], title, rows = parts[name](settings.repeats)
        table = Table(title=title)
        for heading in rows[0]:
            table.add_column(heading, justify="right" if table.columns else "left")
        for row in rows:
            table.add_row(*map(str, row.values()))
        console.print(table)
        if settings.json:
            rundir.write_json(settings.json, found)


if __name__ == "__main__":
    exits.leave(main())

"""What batch normalization is worth over a grid of settings, as heat maps.

    python -m experiments.sweep --learning-rate 1e-4 1e-3 1e-2 --batch-size 32 256 --out DIR

Every cell is a paired run of several replicates. Cells that differ in the learning rate alone are
trained by one program. It leaves sweep.html, which needs no network, sweep.svg and sweep.json; a
sweep that was stopped goes on with the same command.
Exit status: 0 success; 2 a mistake in the command, the settings or the data; 130 after Ctrl-C,
143 after SIGTERM.
"""

import contextlib
import dataclasses
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console

from bnjax import data, paired
from bnjax.data import Dataset
from bnjax.errors import CheckpointError
from bnjax.names import choose
from bnjax.paired import Arm, States
from bnjax.statistics import paired_difference, summarize
from bnjax.training import Batch
from experiments import mnist_bn
from experiments.lab import devices, exits, grids, metrics, rundir
from experiments.lab.console import SHOWN, TITLES, format_summary, print_plain
from experiments.lab.options import flags
from experiments.lab.plan import check_memory, describe, load_data, make_arms
from experiments.lab.presets import PRESETS, Experiment

PROG = "python -m experiments.sweep"
ADAM = optax.inject_hyperparams(optax.adam)(learning_rate=1.0)


@dataclass(frozen=True)
class Settings:
    """The grid; an axis that is not given has the preset's value alone."""

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Directory to create, or to go on in."""

    learning_rate: tuple[float, ...] = ()
    """Of Adam."""

    batch_size: tuple[int, ...] = ()
    """Examples per step."""

    activation: tuple[str, ...] = ()
    """Of the hidden layers."""

    preset: Annotated[str, tyro.conf.arg(metavar="|".join(PRESETS))] = "boostcourse"
    """Everything else."""

    dataset: Annotated[str, tyro.conf.arg(metavar="|".join(data.NAMES))] = "auto"
    """What to train on."""

    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where the dataset's IDX files are."""

    epochs: int | None = None
    """Times through the training set, instead of the preset's."""

    drop_last: bool = False
    """Leave out the last, smaller batch of an epoch."""

    replicates: int = 3
    """Independent pairs of networks in each cell."""

    seed: int = 0
    """Decides everything random."""

    def __post_init__(self) -> None:
        choose("preset", self.preset, PRESETS)
        for name in ("learning_rate", "batch_size", "activation"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has a value twice: {', '.join(map(str, values))}")
        self.groups()

    def groups(self) -> list[list[Experiment]]:
        """The experiments of the grid; those that differ in the learning rate alone together."""
        preset = PRESETS[self.preset]()
        base = dataclasses.replace(
            preset,
            dataset=self.dataset,
            epochs=preset.epochs if self.epochs is None else self.epochs,
            drop_last=preset.drop_last or self.drop_last,
            replicates=self.replicates,
            seed=self.seed,
        )
        return [
            [
                dataclasses.replace(
                    base, activation=activation, batch_size=batch_size, learning_rate=rate
                )
                for rate in self.learning_rate or (base.learning_rate,)
            ]
            for activation in self.activation or (base.activation,)
            for batch_size in self.batch_size or (base.batch_size,)
        ]

    def resolved(self) -> dict[str, Any]:
        """What decides the results, with the preset's values where no others are given."""
        experiments = [one for group in self.groups() for one in group]
        axes = {
            name: list(dict.fromkeys(getattr(one, name) for one in experiments))
            for name in ("learning_rate", "batch_size", "activation")
        }
        first = experiments[0]
        names = ("preset", "epochs", "drop_last", "replicates", "seed")
        return {**axes, **{name: getattr(first, name) for name in names}}


class Cell(NamedTuple):
    """One setting, and its metrics after the last epoch: `{arm: {metric: [R]}}`."""

    activation: str
    batch_size: int
    learning_rate: float
    values: dict[str, dict[str, list[float]]]


def train(group: Sequence[Experiment], dataset: Dataset) -> list[Cell]:
    """The cells of experiments that differ in the learning rate alone, by one program."""
    first, count = group[0], group[0].replicates
    rates = np.repeat([one.learning_rate for one in group], count).astype(np.float32)

    def change(states: States) -> States:
        return {name: grids.with_rates(state, rates) for name, state in states.items()}

    epochs = grids.train(
        [Arm(arm.name, arm.module, ADAM) for arm in make_arms(first)],
        jnp.tile(paired.replicate_keys(first.seed, count), len(group)),
        Batch(dataset.train_images, dataset.train_labels),
        Batch(dataset.test_images, dataset.test_labels),
        epochs=first.epochs,
        batch_size=first.batch_size,
        drop_last=first.drop_last,
        change=change,
    )
    curves = metrics.curves(line for epoch in epochs for line in mnist_bn.metric_lines(epoch))
    last = {
        arm: {name: curves[arm][name][-1].reshape(len(group), count) for name in SHOWN}
        for arm in metrics.ARMS
    }
    return [
        Cell(
            one.activation,
            one.batch_size,
            one.learning_rate,
            {arm: {name: last[arm][name][k].tolist() for name in SHOWN} for arm in metrics.ARMS},
        )
        for k, one in enumerate(group)
    ]


class Worth(NamedTuple):
    """What a cell says of test accuracy.

    Attributes:
        arms: of each arm its summary over the replicates in which it is finite.
        difference: with batch normalization minus without, where both are.
        told: the difference in words, or which network diverged.
    """

    arms: dict[str, dict[str, Any]]
    difference: dict[str, Any]
    told: str


def weigh(cell: Cell) -> Worth:
    """What batch normalization is worth in a cell."""
    values = {arm: cell.values[arm]["test_accuracy"] for arm in metrics.ARMS}
    arms = {arm: summarize(of_arm)._asdict() for arm, of_arm in values.items()}
    first, second = values.values()
    difference = paired_difference(first, second, lower_is_better=False)._asdict()
    told = format_summary("test_accuracy", difference, difference=True)
    if not difference["n"]:
        lost = [metrics.LABELS[arm] for arm in metrics.ARMS if not arms[arm]["n"]]
        told = f"{lost[0] if len(lost) == 1 else 'both'} diverged"
    return Worth(arms, difference, told)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    console = Console()
    settings = tyro.cli(Settings, args=arguments, prog=PROG, description=__doc__)
    path = rundir.expand(settings.out)
    started = False

    def command(check: Callable[[], None]) -> int:
        nonlocal settings, started
        with contextlib.ExitStack() as stack:
            with exits.mistakes():
                dataset = load_data(settings.dataset, settings.data_dir, console)
                requested = settings.dataset
                settings = dataclasses.replace(settings, dataset=dataset.name)
                devices.open_cpus()
                for group in settings.groups():
                    check_group(group, dataset)
                if cache := data.cache_directory():
                    devices.cache_programs(cache / "programs")
                jax.config.update("jax_default_matmul_precision", Experiment.matmul_precision)
                described = describe(settings.resolved(), dataset, requested, settings.data_dir)
                stack.enter_context(rundir.occupied(path, *described))
                started = True
            cells: list[Cell] = []
            for group in settings.groups():
                cells += _train_once(path, group, dataset, console)
                check()
            rows = [(cell, weigh(cell)) for cell in cells]
            content = [{**cell._asdict(), "benefit": worth.difference} for cell, worth in rows]
            rundir.write_json(path / "sweep.json", {"cells": rundir.null_for_nan(content)})
            then = "the same command tries again"
            with exits.optional(console, "the report could not be drawn", then):
                _draw(path, settings, rows)
                print_plain(console, f"report: {path / 'sweep.html'}")
        return 0

    return exits.run(command, lambda: _words(settings) if started else [])


def check_group(group: Sequence[Experiment], dataset: Dataset) -> None:
    """Refuses cells that the data or the memory are too small for.

    Raises:
        ValueError: what is too small.
    """
    group[0].check_against(dataset)
    count = len(group) * group[0].replicates
    memory = devices.memory(devices.make_lanes(make_arms(group[0]), "auto", count))
    check_memory(dataclasses.replace(group[0], replicates=count), memory)


def _train_once(
    path: Path, group: Sequence[Experiment], dataset: Dataset, console: Console
) -> list[Cell]:
    """The cells of a group, read where they are there already."""
    file = path / "cells" / f"{group[0].activation}-{group[0].batch_size}.json"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        trained = [rundir.null_for_nan(cell._asdict()) for cell in train(group, dataset)]
        rundir.write_json(file, {"cells": trained})
    cells = _read(file, group)
    for cell in cells:
        print_plain(
            console,
            f"{cell.activation}, batches of {cell.batch_size}, learning rate "
            f"{cell.learning_rate:g}: {weigh(cell).told}",
        )
    return cells


def _read(file: Path, group: Sequence[Experiment]) -> list[Cell]:
    try:
        found = rundir.read_object(file, ["cells"])["cells"]
        cells = [Cell(**rundir.nan_for_null(one)) for one in found]
    except TypeError:
        cells = []
    settings = ("activation", "batch_size", "learning_rate")
    if [[getattr(one, name) for name in settings] for one in cells] != [
        [getattr(one, name) for name in settings] for one in group
    ]:
        raise CheckpointError(f"{file} is not what this sweep wrote: delete it to train it again")
    return cells


def _draw(path: Path, settings: Settings, rows: Sequence[tuple[Cell, Worth]]) -> None:
    from experiments.report import heat
    from experiments.report.figures import to_svg
    from experiments.report.page import render, svg_uri

    pairs = [row for row in rows if row[1].difference["n"]]
    picture = to_svg(heat.maps(rows))
    rundir.write_bytes(path / "sweep.svg", picture)
    page = render(
        "sweep.html.j2",
        arms=metrics.ARMS,
        command=shlex.join(_words(settings)),
        config=rundir.read_config(path),
        format=format_summary,
        map=svg_uri(picture),
        pairs=sorted(pairs, key=lambda row: row[1].difference["mean"]),
        rows=rows,
        titles=TITLES,
    )
    rundir.write_bytes(path / "sweep.html", page.encode(errors="replace"))


def _words(settings: Settings) -> list[str]:
    """The command that runs the same again."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Settings)}
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    changed = {name: value for name, value in values.items() if value != defaults[name]}
    return [*PROG.split(), *flags(changed)]


if __name__ == "__main__":
    exits.leave(main())

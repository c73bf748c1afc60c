"""What each arm is worth over a grid of settings, as heat maps.

    python -m experiments.sweep --learning-rate 1e-4 1e-3 1e-2 --batch-size 32 256 --out DIR

Every cell is a run of several replicates. Cells that differ in the learning rate alone are
trained by one program. It leaves sweep.html, which needs no network, sweep.json and, of two arms or
more, sweep.svg; a sweep that was stopped goes on with the same command.
Exit status: 0 success; 2 a mistake in the command, the settings or the data; 130 after Ctrl-C,
143 after SIGTERM.
"""

import dataclasses
import itertools
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console

from bnjax.data import Dataset
from bnjax.errors import CheckpointError
from bnjax.names import choose
from experiments.lab import arms, exits, results, rundir
from experiments.lab.cells import AXES, METRIC, SweepCell, train
from experiments.lab.console import format_final, format_summary, print_plain
from experiments.lab.plan import load_data, place_arms
from experiments.lab.presets import PRESETS, Experiment

PROG = "python -m experiments.sweep"


@dataclass(frozen=True, kw_only=True)
class SweepConfig(results.CommonConfig):
    """The grid; an axis that is not given has the preset's value alone."""

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Directory to create, or to go on in."""

    learning_rate: tuple[float, ...] = ()
    """Of Adam."""

    batch_size: tuple[int, ...] = ()
    """Examples per step."""

    activation: tuple[str, ...] = ()
    """Of the hidden layers."""

    arms: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = ("bn", "no_bn")
    """Networks to compare, as of experiments.mnist_bn."""

    reference: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """The arm that the others are held against; by default no_bn where it runs, else the first."""

    preset: Annotated[str, tyro.conf.arg(metavar="|".join(PRESETS))] = "boostcourse"
    """Everything else."""

    epochs: int | None = None
    """Times through the training set, instead of the preset's."""

    drop_last: bool = False
    """Leave out the last, smaller batch of an epoch."""

    replicates: int = 3
    """Independent repetitions in each cell."""

    def __post_init__(self) -> None:
        choose("preset", self.preset, PRESETS)
        for name, values in self.axes().items():
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has a value twice: {', '.join(map(str, values))}")
        self.groups()

    def axes(self) -> dict[str, list[Any]]:
        """The values of each axis."""
        preset = PRESETS[self.preset]
        return {name: list(getattr(self, name) or [getattr(preset, name)]) for name in AXES}

    def groups(self) -> list[list[Experiment]]:
        """The experiments of the grid; those that differ in the learning rate alone together."""
        preset = PRESETS[self.preset]
        base = dataclasses.replace(
            preset,
            arms=self.arms,
            reference=self.reference,
            dataset=self.dataset,
            epochs=preset.epochs if self.epochs is None else self.epochs,
            drop_last=preset.drop_last or self.drop_last,
            replicates=self.replicates,
            seed=self.seed,
        ).resolved()
        *others, rates = self.axes().values()
        return [
            [dataclasses.replace(base, **dict(zip(AXES, (*cell, r), strict=True))) for r in rates]
            for cell in itertools.product(*others)
        ]

    def resolved(self) -> dict[str, Any]:
        """What decides the results, with the preset's values where no others are given."""
        experiment = self.groups()[0][0]
        names = ("reference", "preset", "epochs", "drop_last", "replicates", "seed")
        rest = {name: getattr(experiment, name) for name in names}
        return {**self.axes(), "arms": list(self.arms), **rest}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    config = tyro.cli(SweepConfig, args=arguments, prog=PROG, description=__doc__)
    console = Console()
    again: list[str] = []

    def command(raise_if_stopped: Callable[[], None]) -> None:
        with exits.user_errors():
            path = rundir.expand(config.out)
            dataset = load_data(config.dataset, config.data_dir, console)
            results.set_up_jax()
            groups = config.groups()
            for group in groups:
                place_arms(group[0], dataset, cells=len(group))
        with results.directory(path, config.resolved(), config, dataset):
            again.extend(results.command(PROG, config))
            cells: list[SweepCell] = []
            for group in groups:
                for cell in _train_once(path, group, dataset):
                    print_plain(console, f"{cell.name}: {_tell(cell)}")
                    cells.append(cell)
                raise_if_stopped()
            numbers = [rundir.null_for_nan(cell.numbers()) for cell in cells]
            rundir.write_json(path / "sweep.json", {"cells": numbers})
            what = "the report could not be drawn"
            with exits.optional(console, what, "the same command tries again"):
                _draw(path, dataclasses.replace(config, dataset=dataset.name), cells)
                print_plain(console, f"report: {path / 'sweep.html'}")

    return exits.run(command, lambda: again)


def _train_once(path: Path, group: Sequence[Experiment], dataset: Dataset) -> list[SweepCell]:
    """The cells of a group, read where they are there already."""
    file = path / "cells" / f"{group[0].activation}-{group[0].batch_size}.json"
    rates = [str(one.learning_rate) for one in group]
    if not file.exists():
        trained = dict(zip(rates, train(group, dataset), strict=True))
        rundir.write_json(file, rundir.null_for_nan(trained))
    try:
        saved = rundir.read_object(file, dict.fromkeys(rates, dict))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete it to train it again") from error
    return [SweepCell(one, saved[rate]) for one, rate in zip(group, rates, strict=True)]


def _tell(cell: SweepCell) -> str:
    """A cell in a line: its only network, the only difference, or all of them and the best."""
    labels = {spec.name: spec.label for spec in arms.choose(cell.experiment)}
    told = {arm: cell.tell(arm) for arm in cell.summary["differences"]}
    if not told:
        (only,) = cell.summary["arms"].values()
        return format_summary(METRIC, only[METRIC])
    if len(told) == 1:
        return "".join(told.values())
    best = " and ".join(labels[arm] for arm in cell.best) or "none"
    return "".join(f"{labels[arm]}: {text}; " for arm, text in told.items()) + f"best: {best}"


def _draw(path: Path, config: SweepConfig, cells: Sequence[SweepCell]) -> None:
    from experiments.report import heat
    from experiments.report.figures import to_svg
    from experiments.report.page import render, svg_uri

    experiment = cells[0].experiment
    specs = arms.choose(experiment)
    labels = {spec.name: spec.label for spec in specs}
    others = {arm: label for arm, label in labels.items() if arm != experiment.reference}
    picture = to_svg(heat.maps(cells, others)) if others else None
    if picture:
        rundir.write_bytes(path / "sweep.svg", picture)
    page = render(
        "sweep.html.j2",
        cells=cells,
        command=shlex.join(results.command(PROG, config)),
        config=rundir.read_config(path),
        format=format_final,
        labels=labels,
        map=picture and svg_uri(picture),
        ranked={arm: _ranked(cells, arm) for arm in others},
        reference=experiment.reference,
        titles={spec.name: spec.title or spec.label for spec in specs},
    )
    rundir.write_bytes(path / "sweep.html", page.encode(errors="replace"))


def _ranked(cells: Sequence[SweepCell], arm: str) -> list[SweepCell]:
    """The cells in which an arm can be held against the reference, by what it is worth."""
    finite = [cell for cell in cells if np.isfinite(cell.points(arm))]
    return sorted(finite, key=lambda cell: cell.points(arm))


if __name__ == "__main__":
    exits.leave(main())

"""What each arm is worth over a grid of settings, as heat maps.

    python -m experiments.sweep --learning-rate 1e-4 1e-3 1e-2 --batch-size 32 256 --out DIR

Every cell is a run of several replicates. Cells that differ in the learning rate alone are
trained by one program. It leaves sweep.html, which needs no network, sweep.json and, of two arms or
more, sweep.svg; a sweep that was stopped goes on with the same command.
Exit status: 0 success; 2 a mistake in the command, the settings or the data; 130 after Ctrl-C,
143 after SIGTERM.
"""

import contextlib
import dataclasses
import itertools
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from bnjax.data import Dataset
from bnjax.errors import CheckpointError
from bnjax.names import choose
from experiments.lab import arms, exits, results, rundir
from experiments.lab.cells import METRIC, SETTING, CellResult, SweepCell, summarize_cell, train
from experiments.lab.console import format_final, format_summary, print_plain
from experiments.lab.plan import load_data, place_arms
from experiments.lab.presets import PRESETS, Experiment

PROG = "python -m experiments.sweep"
AXES = ("learning_rate", "activation", "batch_size")
Row = tuple[SweepCell, CellResult]


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
        rates, *others = self.axes().values()
        return [
            [dataclasses.replace(base, **dict(zip(AXES, (r, *cell), strict=True))) for r in rates]
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
            labels = {spec.name: spec.label for spec in arms.choose(groups[0][0])}
            rows: list[Row] = []
            for group in groups:
                for cell in _train_once(path, group, dataset):
                    rows.append((cell, summarize_cell(cell, str(group[0].reference), labels)))
                    print_plain(console, f"{cell.name}: {_tell(rows[-1][1], labels)}")
                raise_if_stopped()
            cells = [
                {**cell._asdict(), "differences": found.summary["differences"], "best": found.best}
                for cell, found in rows
            ]
            rundir.write_json(path / "sweep.json", {"cells": rundir.null_for_nan(cells)})
            what = "the report could not be drawn"
            with exits.optional(console, what, "the same command tries again"):
                _draw(path, dataclasses.replace(config, dataset=dataset.name), rows)
                print_plain(console, f"report: {path / 'sweep.html'}")

    return exits.run(command, lambda: again)


def _train_once(path: Path, group: Sequence[Experiment], dataset: Dataset) -> list[SweepCell]:
    """The cells of a group, read where they are there already."""
    file = path / "cells" / f"{group[0].activation}-{group[0].batch_size}.json"
    if not file.exists():
        trained = [rundir.null_for_nan(cell._asdict()) for cell in train(group, dataset)]
        rundir.write_json(file, {"cells": trained})
    saved = rundir.read_object(file, {"cells": list})["cells"]
    with contextlib.suppress(TypeError):
        cells = [SweepCell(**rundir.nan_for_null(one)) for one in saved]
        if [cell[:3] for cell in cells] == [SETTING(one) for one in group]:
            return cells
    raise CheckpointError(f"{file} is not what this sweep wrote: delete it to train it again")


def _tell(found: CellResult, labels: Mapping[str, str]) -> str:
    """A cell in a line: its only network, the only difference, or all of them and the best."""
    if len(labels) == 1:
        (only,) = found.summary["arms"].values()
        return format_summary(METRIC, only[METRIC])
    if len(labels) == 2:
        return "".join(found.told.values())
    told = "".join(f"{labels[arm]}: {text}; " for arm, text in found.told.items())
    return f"{told}best: {' and '.join(labels[arm] for arm in found.best) or 'none'}"


def _draw(path: Path, config: SweepConfig, rows: Sequence[Row]) -> None:
    from experiments.report import heat
    from experiments.report.figures import to_svg
    from experiments.report.page import render, svg_uri

    experiment = config.groups()[0][0]
    specs = arms.choose(experiment)
    labels = {spec.name: spec.label for spec in specs}
    others = {arm: label for arm, label in labels.items() if arm != experiment.reference}
    picture = to_svg(heat.maps(rows, others)) if others else None
    if picture:
        rundir.write_bytes(path / "sweep.svg", picture)
    page = render(
        "sweep.html.j2",
        command=shlex.join(results.command(PROG, config)),
        config=rundir.read_config(path),
        format=format_final,
        labels=labels,
        map=picture and svg_uri(picture),
        ranked={arm: _ranked(rows, arm) for arm in others},
        reference=experiment.reference,
        rows=rows,
        titles={spec.name: spec.title or spec.label for spec in specs},
    )
    rundir.write_bytes(path / "sweep.html", page.encode(errors="replace"))


def _ranked(rows: Sequence[Row], arm: str) -> list[Row]:
    """The cells in which an arm can be held against the reference, by what it is worth."""

    def worth(row: Row) -> Any:
        return row[1].summary["differences"][arm][METRIC]["mean"]

    return sorted((row for row in rows if worth(row) is not None), key=worth)


if __name__ == "__main__":
    exits.leave(main())

"""What each arm is worth over a grid of settings, as heat maps.

    python -m experiments.sweep --learning-rate 1e-4 1e-3 1e-2 --batch-size 32 256 --out DIR

Every cell is a run of several replicates. Cells that differ in the learning rate alone are
trained by one program. It leaves sweep.html, which needs no network, sweep.svg and sweep.json; a
sweep that was stopped goes on with the same command.
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

import jax
import tyro
from rich.console import Console

from bnjax import data
from bnjax.data import Dataset
from bnjax.errors import CheckpointError
from bnjax.names import choose
from experiments.lab import arms, devices, exits, rundir
from experiments.lab.cells import METRIC, CellResult, SweepCell, summarize_cell, train
from experiments.lab.console import format_final, format_summary, print_plain
from experiments.lab.options import flags
from experiments.lab.plan import check_memory, describe, load_data
from experiments.lab.presets import PRESETS, Experiment

PROG = "python -m experiments.sweep"
AXES = ("learning_rate", "activation", "batch_size")
Row = tuple[SweepCell, CellResult]


@dataclass(frozen=True)
class SweepConfig:
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

    dataset: Annotated[str, tyro.conf.arg(metavar="|".join(data.NAMES))] = "auto"
    """What to train on."""

    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where the dataset's IDX files are."""

    epochs: int | None = None
    """Times through the training set, instead of the preset's."""

    drop_last: bool = False
    """Leave out the last, smaller batch of an epoch."""

    replicates: int = 3
    """Independent repetitions in each cell."""

    seed: int = 0
    """Decides everything random."""

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
    console = Console()
    settings = tyro.cli(SweepConfig, args=arguments, prog=PROG, description=__doc__)
    path = rundir.expand(settings.out)
    started = False

    def command(raise_if_stopped: Callable[[], None]) -> int:
        nonlocal settings, started
        with contextlib.ExitStack() as stack:
            with exits.user_errors():
                dataset = load_data(settings.dataset, settings.data_dir, console)
                requested = settings.dataset
                settings = dataclasses.replace(settings, dataset=dataset.name)
                devices.set_cpu_devices()
                groups = settings.groups()
                for group in groups:
                    check_group(group, dataset)
                if cache := data.cache_directory():
                    devices.enable_compilation_cache(cache / "programs")
                jax.config.update("jax_default_matmul_precision", Experiment.matmul_precision)
                described = describe(settings.resolved(), dataset, requested, settings.data_dir)
                stack.enter_context(rundir.claim_directory(path, *described))
                started = True
            labels = {spec.name: spec.label for spec in arms.choose(groups[0][0])}
            rows: list[Row] = []
            for group in groups:
                for cell in _train_once(path, group, dataset):
                    rows.append((cell, summarize_cell(cell, str(group[0].reference), labels)))
                    print_plain(console, f"{_name(cell)}: {_tell(rows[-1][1], labels)}")
                raise_if_stopped()
            content = [
                {
                    **cell._asdict(),
                    "differences": result.summary["differences"],
                    "best": result.best,
                }
                for cell, result in rows
            ]
            rundir.write_json(path / "sweep.json", {"cells": rundir.null_for_nan(content)})
            then = "the same command tries again"
            with exits.optional(console, "the report could not be drawn", then):
                _draw(path, settings, rows)
                print_plain(console, f"report: {path / 'sweep.html'}")
        return 0

    return exits.run(command, lambda: _words(settings) if started else [])


def _name(cell: SweepCell) -> str:
    return f"{cell.activation}, batches of {cell.batch_size}, learning rate {cell.learning_rate:g}"


def _tell(result: CellResult, labels: Mapping[str, str]) -> str:
    if not result.told:
        return "".join(
            format_summary(METRIC, one[METRIC]) for one in result.summary["arms"].values()
        )
    if len(result.told) == 1:
        return "".join(result.told.values())
    told = "".join(f"{labels[arm]}: {text}; " for arm, text in result.told.items())
    return f"{told}best: {' and '.join(labels[arm] for arm in result.best) or 'none'}"


def check_group(group: Sequence[Experiment], dataset: Dataset) -> None:
    """Refuses cells that the data or the memory are too small for, and arms that cannot be.

    Raises:
        ValueError: what does not fit.
    """
    made = arms.make_arms(group[0])
    group[0].check_against(dataset)
    arms.check_sizes(group[0], len(dataset.train_labels))
    count = len(group) * group[0].replicates
    memory = devices.memory(devices.make_placements(made, "auto", count))
    check_memory(made, count, dataset.train_images, memory)


def _train_once(path: Path, group: Sequence[Experiment], dataset: Dataset) -> list[SweepCell]:
    """The cells of a group, read where they are there already."""
    file = path / "cells" / f"{group[0].activation}-{group[0].batch_size}.json"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        trained = [rundir.null_for_nan(cell._asdict()) for cell in train(group, dataset)]
        rundir.write_json(file, {"cells": trained})
    saved = rundir.read_object(file, ["cells"])["cells"]
    with contextlib.suppress(TypeError):
        cells = [SweepCell(**rundir.nan_for_null(one)) for one in saved]
        settings = [(one.activation, one.batch_size, one.learning_rate) for one in group]
        if [cell[:3] for cell in cells] == settings:
            return cells
    raise CheckpointError(f"{file} is not what this sweep wrote: delete it to train it again")


def _draw(path: Path, settings: SweepConfig, rows: Sequence[Row]) -> None:
    from experiments.report import heat
    from experiments.report.figures import to_svg
    from experiments.report.page import render, svg_uri

    experiment = settings.groups()[0][0]
    specs = {spec.name: spec for spec in arms.choose(experiment)}
    labels = {arm: spec.label for arm, spec in specs.items()}
    others = {arm: label for arm, label in labels.items() if arm != experiment.reference}
    picture = to_svg(heat.maps(rows, others)) if others else b""
    rundir.write_bytes(path / "sweep.svg", picture)
    page = render(
        "sweep.html.j2",
        command=shlex.join(_words(settings)),
        config=rundir.read_config(path),
        format=format_final,
        labels=labels,
        map=picture and svg_uri(picture),
        name=_name,
        ranked={arm: _ranked(rows, arm) for arm in others},
        reference=experiment.reference,
        rows=rows,
        titles={arm: spec.title or spec.label for arm, spec in specs.items()},
    )
    rundir.write_bytes(path / "sweep.html", page.encode(errors="replace"))


def _ranked(rows: Sequence[Row], arm: str) -> list[Row]:
    """The cells in which an arm can be held against the reference, by what it is worth."""

    def worth(row: Row) -> Any:
        return row[1].summary["differences"][arm][METRIC]["mean"]

    return sorted((row for row in rows if worth(row) is not None), key=worth)


def _words(settings: SweepConfig) -> list[str]:
    """The command that runs the same again."""
    values = {field: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    changed = {field.name: value for field, value in values.items() if value != field.default}
    return [*PROG.split(), *flags(changed)]


if __name__ == "__main__":
    exits.leave(main())

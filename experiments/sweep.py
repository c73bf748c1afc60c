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
from experiments.lab.cells import CellResult, SweepCell, summarize_cell, train
from experiments.lab.console import format_summary, print_plain
from experiments.lab.options import flags
from experiments.lab.plan import check_memory, describe, load_data
from experiments.lab.presets import PRESETS, Experiment

PROG = "python -m experiments.sweep"


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
        for name in ("learning_rate", "batch_size", "activation"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has a value twice: {', '.join(map(str, values))}")
        self.groups()

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
        names = ("arms", "reference", "preset", "epochs", "drop_last", "replicates", "seed")
        rest = {name: getattr(first, name) for name in names}
        return {**axes, **rest, "arms": list(first.arms)}


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
                for group in settings.groups():
                    check_group(group, dataset)
                if cache := data.cache_directory():
                    devices.enable_compilation_cache(cache / "programs")
                jax.config.update("jax_default_matmul_precision", Experiment.matmul_precision)
                described = describe(settings.resolved(), dataset, requested, settings.data_dir)
                stack.enter_context(rundir.claim_directory(path, *described))
                started = True
            specs = {spec.name: spec for spec in arms.choose(group[0])}
            labels = {arm: spec.label for arm, spec in specs.items()}
            reference = str(group[0].reference)
            rows: list[tuple[SweepCell, CellResult]] = []
            for group in settings.groups():
                for cell in _train_once(path, group, dataset):
                    rows.append((cell, summarize_cell(cell, reference, labels)))
                    print_plain(console, f"{_name(cell)}: {_tell(rows[-1][1], labels)}")
                raise_if_stopped()
            content = [
                {**cell._asdict(), "differences": found.differences, "best": found.best}
                for cell, found in rows
            ]
            rundir.write_json(path / "sweep.json", {"cells": rundir.null_for_nan(content)})
            then = "the same command tries again"
            with exits.optional(console, "the report could not be drawn", then):
                _draw(path, settings, rows, specs, reference)
                print_plain(console, f"report: {path / 'sweep.html'}")
        return 0

    return exits.run(command, lambda: _words(settings) if started else [])


def _name(cell: SweepCell) -> str:
    return f"{cell.activation}, batches of {cell.batch_size}, learning rate {cell.learning_rate:g}"


def _tell(found: CellResult, labels: Mapping[str, str]) -> str:
    if len(found.told) == 1:
        return "".join(found.told.values())
    told = "".join(f"{labels[arm]} {text}, " for arm, text in found.told.items())
    return f"{told}best: {' and '.join(labels[arm] for arm in found.best) or 'none'}"


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
    try:
        found = rundir.read_object(file, ["cells"])["cells"]
        cells = [SweepCell(**rundir.nan_for_null(one)) for one in found]
    except TypeError:
        cells = []
    settings = ("activation", "batch_size", "learning_rate")
    if [[getattr(one, name) for name in settings] for one in cells] != [
        [getattr(one, name) for name in settings] for one in group
    ]:
        raise CheckpointError(f"{file} is not what this sweep wrote: delete it to train it again")
    return cells


def _draw(
    path: Path,
    settings: SweepConfig,
    rows: Sequence[tuple[SweepCell, CellResult]],
    specs: Mapping[str, arms.ArmSpec],
    reference: str,
) -> None:
    from experiments.report import heat
    from experiments.report.figures import to_svg
    from experiments.report.page import render, svg_uri

    labels = {arm: spec.label for arm, spec in specs.items()}
    others = [arm for arm in specs if arm != reference]
    pairs = {
        arm: sorted(
            (row for row in rows if row[1].differences[arm]["n"]),
            key=lambda row: row[1].differences[arm]["mean"],
        )
        for arm in others
    }
    picture = to_svg(heat.maps(rows, {arm: labels[arm] for arm in others})) if others else b""
    rundir.write_bytes(path / "sweep.svg", picture)
    page = render(
        "sweep.html.j2",
        arms=list(specs),
        command=shlex.join(_words(settings)),
        config=rundir.read_config(path),
        format=format_summary,
        labels=labels,
        map=picture and svg_uri(picture),
        name=_name,
        others=others,
        pairs=pairs,
        reference=reference,
        rows=rows,
        titles={arm: spec.title or spec.label for arm, spec in specs.items()},
    )
    rundir.write_bytes(path / "sweep.html", page.encode(errors="replace"))


def _words(settings: SweepConfig) -> list[str]:
    """The command that runs the same again."""
    values = {
        field.name: getattr(settings, field.name) for field in dataclasses.fields(SweepConfig)
    }
    defaults = {field.name: field.default for field in dataclasses.fields(SweepConfig)}
    changed = {name: value for name, value in values.items() if value != defaults[name]}
    return [*PROG.split(), *flags(changed)]


if __name__ == "__main__":
    exits.leave(main())

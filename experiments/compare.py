"""What differs between runs: settings, curves, and replicate by replicate where seeds match.

    python -m experiments.compare runs/first runs/second --out runs/compared

The first run is what the others are held against. It leaves compare.html, which needs no
network, compare.svg and compare.json.
"""

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from rich.console import Console

from bnjax.statistics import paired_difference
from experiments.lab import exits, metrics, options, rundir
from experiments.lab.console import SHOWN, TITLES, format_certainty, format_summary, print_plain
from experiments.lab.presets import Experiment

PROG = "python -m experiments.compare"


@dataclass(frozen=True)
class Settings:
    """What is compared."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN ...")]
    """Directories of runs, two or more."""

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Directory to create."""

    def __post_init__(self) -> None:
        places = [rundir.expand(path).resolve() for path in self.runs]
        if len(set(places)) < max(2, len(places)):
            raise ValueError("expected two runs or more to compare, each of them once")


class Run(NamedTuple):
    """What a run saved, `curves` as `metrics.curves` has them."""

    name: str
    config: dict[str, Any]
    curves: dict[str, dict[str, np.ndarray]]
    summary: dict[str, Any]


def read(path: Path) -> Run:
    """A run, ended or not.

    Raises:
        ValueError: if it is none, is damaged, or has no epoch yet.
    """
    config, lines = rundir.read_config(path), metrics.read(path)
    if not lines:
        raise ValueError(f"{path} is no run of experiments.mnist_bn, or has no epoch yet")
    Experiment.load(config["experiment"])
    return Run(path.name, config, metrics.curves(lines), metrics.summarize(lines))


def differences(compared: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings, data and versions that differ, `{name: [value of each run]}`."""
    told = [
        {
            **run.config["experiment"],
            "data": f"{run.config['dataset']['name']} {run.config['dataset']['sha256'][:12]}",
            **{f"{name} version": v for name, v in run.config["versions"].items()},
            "git_commit": run.config.get("git_commit"),
        }
        for run in compared
    ]
    names = list(dict.fromkeys(name for one in told for name in one))
    rows = {name: [one.get(name) for one in told] for name in names}
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row)}


def pair(first: Run, other: Run) -> dict[str, dict[str, Any]] | None:
    """Other minus first after the last epoch that both have.

    Replicate k of both was drawn from the same key, and saw the same batches if they are of one
    size, where seed and data are the same; otherwise there are no pairs, and None is returned.

    Returns:
        `{arm: {metric: difference}}`, and under `difference` that of with BN minus without.
    """
    seeds = [
        (r.config["experiment"]["seed"], r.config["dataset"]["sha256"]) for r in (first, other)
    ]
    if seeds[0] != seeds[1]:
        return None
    ours, others = (run.curves[metrics.ARMS[0]][metrics.METRICS[0]].shape for run in (first, other))
    epoch, count = min(ours[0], others[0]) - 1, min(ours[1], others[1])

    def values(run: Run, name: str) -> dict[str, np.ndarray]:
        arms = {arm: run.curves[arm][name][epoch, :count] for arm in metrics.ARMS}
        return {**arms, "difference": arms["bn"] - arms["no_bn"]}

    return {
        arm: {
            name: paired_difference(
                values(other, name)[arm],
                values(first, name)[arm],
                lower_is_better=not name.endswith("accuracy"),
            )._asdict()
            for name in SHOWN
        }
        for arm in (*metrics.ARMS, "difference")
    }


def write(path: Path, compared: Sequence[Run]) -> None:
    """Writes the numbers, the picture and the page into a directory."""
    different = differences(compared)
    paired = {run.name: pair(compared[0], run) for run in compared[1:]}
    path.mkdir(parents=True, exist_ok=True)
    rundir.write_json(
        path / "compare.json",
        {
            "runs": {run.name: run.summary for run in compared},
            "differences": different,
            "paired": paired,
        },
    )
    from experiments.report import figures  # matplotlib may fail, the numbers are there
    from experiments.report.page import render, svg_uri

    picture = figures.to_svg(figures.overlay({run.name: run.curves for run in compared}))
    rundir.write_bytes(path / "compare.svg", picture)
    page = render(
        "compare.html.j2",
        arms=metrics.ARMS,
        replaced=any(rundir.is_replaced(run.config) for run in compared),
        certainty=format_certainty,
        commands={run.name: options.repeat(run.config) for run in compared},
        curves=svg_uri(picture),
        different=different,
        format=format_summary,
        paired=paired,
        runs=compared,
        shown=list(SHOWN),
        titles={**TITLES, "difference": "difference"},
    )
    rundir.write_bytes(path / "compare.html", page.encode(errors="replace"))


def _names(paths: Sequence[Path]) -> list[str]:
    """What the paths end with, as much as tells them apart."""
    ends = (["/".join(path.parts[-n:]) for path in paths] for n in itertools.count(1))
    return next(names for names in ends if len(set(names)) == len(paths))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    settings = tyro.cli(Settings, args=arguments, prog=PROG, description=__doc__)
    console = Console()

    def command(check: Callable[[], None]) -> int:
        with exits.mistakes():
            out = rundir.expand(settings.out)
            rundir.check_free(out)
            paths = [rundir.expand(path).resolve() for path in settings.runs]
            compared = [
                read(path)._replace(name=name)
                for path, name in zip(paths, _names(paths), strict=True)
            ]
        told = "the comparison could not be drawn"
        with exits.optional(console, told, f"its numbers are in {out / 'compare.json'}"):
            write(out, compared)
            print_plain(console, f"comparison: {out / 'compare.html'}")
        for name, values in differences(compared).items():
            print_plain(console, f"{name}: {', '.join(map(str, values))}")
        return 0

    return exits.run(command, list)


if __name__ == "__main__":
    sys.exit(main())

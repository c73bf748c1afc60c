"""What differs between runs: settings, curves, and replicate by replicate where seeds match.

    python -m experiments.compare runs/first runs/second --out runs/compared

The first run is what the others are held against, in the arms that both have. It leaves
compare.html, which needs no network, compare.svg and compare.json.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console

from experiments.lab import exits, metrics, options, rundir
from experiments.lab.console import SHOWN, format_certainty, format_summary, print_plain
from experiments.lab.run import Run

PROG = "python -m experiments.compare"

Runs = Mapping[str, Run]  # by name; the first is what the others are held against


@dataclass(frozen=True)
class CompareConfig:
    """What is compared."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN ...")]
    """Directories of runs, two or more."""

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Directory to create."""

    def __post_init__(self) -> None:
        places = [rundir.expand(path).resolve() for path in self.runs]
        if len(set(places)) < max(2, len(places)):
            raise ValueError("expected two runs or more to compare, each of them once")


def read(path: Path) -> Run:
    """A run, ended or not.

    Raises:
        ValueError: if it is none, is damaged, or has no epoch yet.
    """
    run = Run(path)
    if not run.epochs:
        raise ValueError(f"{path} has no epoch yet: let it run, or leave it out")
    return run


def differences(compared: Runs) -> dict[str, list[Any]]:
    """The settings, data and versions that differ, `{name: [value of each run]}`."""
    told = [
        {
            **run.config["experiment"],
            "data": f"{run.config['dataset']['name']} {run.config['dataset']['sha256'][:12]}",
            **{f"{name} version": v for name, v in run.config["versions"].items()},
            "git_commit": run.config.get("git_commit"),
        }
        for run in compared.values()
    ]
    names = list(dict.fromkeys(name for one in told for name in one))
    rows = {name: [one.get(name) for one in told] for name in names}
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row)}


def pair(first: Run, other: Run) -> dict[str, dict[str, Any]] | None:
    """Other minus first after the last epoch that both have, for what both have.

    Replicate k of both was drawn from the same key, and saw the same batches if they are of one
    size, where seed and data are the same; otherwise there are no pairs, and None is returned.

    Returns:
        `{arm: {metric: difference}}`, and as `{arm minus reference: ...}` how much more an arm is
        worth, for each that is held against the same reference in both.
    """
    if _origin(first) != _origin(other):
        return None
    epoch = min(first.epochs, other.epochs) - 1
    count = min(first.experiment.replicates, other.experiment.replicates)
    before, after = (_final(run, epoch, count) for run in (first, other))
    return {
        name: {metric: metrics.difference(metric, after[name], before[name]) for metric in SHOWN}
        for name in before
        if name in after
    }


def _final(run: Run, epoch: int, count: int) -> dict[str, dict[str, np.ndarray]]:
    """The metrics of each arm, and what each but the reference is worth."""
    arms = {
        arm: {metric: of_arm[metric][epoch, :count] for metric in SHOWN}
        for arm, of_arm in run.metrics.items()
    }
    worth = {
        f"{arm} minus {run.reference}": {m: arms[arm][m] - arms[run.reference][m] for m in SHOWN}
        for arm in run.others
    }
    return arms | worth


def _origin(run: Run) -> tuple[int, str]:
    return run.experiment.seed, run.config["dataset"]["sha256"]


def write(path: Path, compared: Runs) -> None:
    """Writes the numbers, the picture and the page into a directory."""
    different = differences(compared)
    summaries = {
        name: metrics.summarize(run.metrics, run.reference) for name, run in compared.items()
    }
    first, *others = compared
    paired = {name: pair(compared[first], compared[name]) for name in others}
    path.mkdir(parents=True, exist_ok=True)
    content = {"runs": summaries, "differences": different, "paired": paired}
    rundir.write_json(path / "compare.json", content)
    from experiments.report import figures  # matplotlib may fail, the numbers are there
    from experiments.report.page import is_replaced, render, svg_uri

    drawn = {name: (run.metrics, run.labels) for name, run in compared.items()}
    picture = figures.to_svg(figures.overlay(drawn))
    rundir.write_bytes(path / "compare.svg", picture)
    titles = {arm: title for run in compared.values() for arm, title in run.titles.items()}
    titles |= {
        f"{arm} minus {run.reference}": f"{titles[arm]}, minus {titles[run.reference]}"
        for run in compared.values()
        for arm in run.others
    }
    page = render(
        "compare.html.j2",
        replaced=any(is_replaced(run.config) for run in compared.values()),
        certainty=format_certainty,
        commands={name: options.repeat(run.config) for name, run in compared.items()},
        curves=svg_uri(picture),
        different=different,
        format=format_summary,
        paired=paired,
        runs=compared,
        shown=list(SHOWN),
        summaries=summaries,
        titles=titles,
    )
    rundir.write_bytes(path / "compare.html", page.encode(errors="replace"))


def _names(paths: Sequence[Path]) -> list[str]:
    """What the paths end with, as much as tells them apart."""
    ends = (["/".join(path.parts[-n:]) for path in paths] for n in itertools.count(1))
    return next(names for names in ends if len(set(names)) == len(paths))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    settings = tyro.cli(CompareConfig, args=arguments, prog=PROG, description=__doc__)
    console = Console()

    def command(raise_if_stopped: Callable[[], None]) -> int:
        with exits.user_errors():
            out = rundir.expand(settings.out)
            rundir.check_free(out)
            paths = [rundir.expand(path).resolve() for path in settings.runs]
            compared = {name: read(path) for path, name in zip(paths, _names(paths), strict=True)}
        told = "the comparison could not be drawn"
        with exits.optional(console, told, f"its numbers are in {out / 'compare.json'}"):
            write(out, compared)
            print_plain(console, f"comparison: {out / 'compare.html'}")
        for name, values in differences(compared).items():
            print_plain(console, f"{name}: {', '.join(map(str, values))}")
        return 0

    return exits.run(command)


if __name__ == "__main__":
    exits.leave(main())

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

import tyro
from rich.console import Console

from experiments.lab import exits, metrics, options, rundir
from experiments.lab.console import SHOWN, print_plain
from experiments.lab.run import Run

PROG = "python -m experiments.compare"


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


def differences(compared: Mapping[str, Run]) -> dict[str, list[Any]]:
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
    names = dict.fromkeys(name for one in told for name in one)
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
    both = first, other
    if len({(run.experiment.seed, run.config["dataset"]["sha256"]) for run in both}) > 1:
        return None
    epoch = min(run.epochs for run in both) - 1
    count = min(run.experiment.replicates for run in both)
    finals = []
    for run in both:
        final = {
            arm: {metric: of_arm[metric][epoch, :count] for metric in SHOWN}
            for arm, of_arm in run.metrics.items()
        }
        minus = final[run.reference]
        final |= {
            f"{arm} minus {run.reference}": {m: final[arm][m] - minus[m] for m in SHOWN}
            for arm in run.others
        }
        finals.append(final)
    before, after = finals
    return {
        name: {metric: metrics.difference(metric, after[name], before[name]) for metric in SHOWN}
        for name in before
        if name in after
    }


def write(path: Path, compared: Mapping[str, Run]) -> None:
    """Writes the numbers, the picture and the page of runs by name, held against the first."""
    first, *others = compared
    content = {
        "runs": {
            name: metrics.summarize(run.metrics, run.reference) for name, run in compared.items()
        },
        "differences": differences(compared),
        "paired": {name: pair(compared[first], compared[name]) for name in others},
    }
    path.mkdir(parents=True, exist_ok=True)
    rundir.write_json(path / "compare.json", content)
    from experiments.report import figures  # matplotlib may fail, the numbers are there
    from experiments.report.page import render, svg_uri

    picture = figures.to_svg(figures.overlay(compared))
    rundir.write_bytes(path / "compare.svg", picture)
    titles: dict[str, str] = {}
    for run in compared.values():
        titles |= run.titles
        minus, title = f" minus {run.reference}", f", minus {run.titles[run.reference]}"
        titles |= {arm + minus: run.titles[arm] + title for arm in run.others}
    page = render(
        "compare.html.j2",
        **content,
        compared=compared,
        curves=svg_uri(picture),
        repeat=options.repeat,
        titles=titles,
    )
    rundir.write_bytes(path / "compare.html", page.encode(errors="replace"))


def _names(paths: Sequence[Path]) -> list[str]:
    """What the paths end with, as much as tells them apart."""
    ends = (["/".join(path.parts[-n:]) for path in paths] for n in itertools.count(1))
    return next(names for names in ends if len(set(names)) == len(paths))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    config = tyro.cli(CompareConfig, args=arguments, prog=PROG, description=__doc__)
    console = Console()

    def command(_: Callable[[], None]) -> None:
        with exits.user_errors():
            out = rundir.expand(config.out)
            rundir.check_free(out)
            paths = [rundir.expand(path).resolve() for path in config.runs]
            compared = dict(zip(_names(paths), map(Run, paths), strict=True))
            for path, run in zip(paths, compared.values(), strict=True):
                if not run.epochs:
                    raise ValueError(f"{path} has no epoch yet: let it run, or leave it out")
        then = f"its numbers are in {out / 'compare.json'}"
        with exits.optional(console, "the comparison could not be drawn", then):
            write(out, compared)
            print_plain(console, f"comparison: {out / 'compare.html'}")
        for name, values in differences(compared).items():
            print_plain(console, f"{name}: {', '.join(map(str, values))}")

    return exits.run(command)


if __name__ == "__main__":
    exits.leave(main())

"""Re-runs what papers, courses and notebooks claim about batch normalization, with verdicts.

    python -m experiments.reproduce                       lists the claims
    python -m experiments.reproduce rank-collapse         runs one, or several
    python -m experiments.reproduce all --quick           runs less of each, minutes in all
    python -m experiments.reproduce all --out DIR         goes on in DIR, if it stopped there

Each claim ends in PASS, FAIL or INCONCLUSIVE, by a criterion that was written before the run. DIR
holds report.html, which puts published beside measured figures and opens without a network,
verdicts.json, and a directory for each claim with its evidence and its picture.

Exit status: 0 whatever the verdicts; 2 a mistake in the command, the settings or the data;
130 after Ctrl-C, 143 after SIGTERM.
"""

import contextlib
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bnjax import data
from bnjax.data import Dataset
from bnjax.names import choose
from experiments.claims import Claim, Settings, load_claims, verdicts
from experiments.claims.verdicts import format_seconds
from experiments.lab import devices, exits, rundir
from experiments.lab.console import print_plain
from experiments.lab.options import flags
from experiments.lab.plan import describe, load_data
from experiments.lab.presets import MAX_SEED, PRESETS, Experiment

FEWEST = 512
MAX_REPLICATES = 10_000
PROG = "python -m experiments.reproduce"


@dataclass(frozen=True)
class Options:
    """The command line.

    Raises:
        ValueError: if a value is not usable, in one sentence.
    """

    claims: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CLAIM"), tyro.conf.Positional] = ()
    """Claims to run, by their ids, or all; none lists them."""

    quick: bool = False
    """Run less of each claim: all of them take minutes."""

    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where the dataset's IDX files are."""

    dataset: Annotated[str, tyro.conf.arg(metavar="|".join(data.NAMES))] = "auto"
    """What to train on; the published figures are MNIST's."""

    replicates: int | None = None
    """Independent repetitions of each claim, instead of its own number."""

    seed: int = 0
    """Decides everything random."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory to create, or to go on in; by default runs/reproduce-DATASET-TIME."""

    def __post_init__(self) -> None:
        choose("dataset", self.dataset, data.NAMES)
        if self.replicates is not None and not 1 <= self.replicates <= MAX_REPLICATES:
            raise ValueError(f"replicates is {self.replicates}: expected 1 to {MAX_REPLICATES}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed is {self.seed}: expected 0 to {MAX_SEED}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    console = Console()
    path: Path | None = None
    options = tyro.cli(Options, args=arguments, prog=PROG, description=__doc__)

    def command(raise_if_stopped: Callable[[], None]) -> int:
        nonlocal path
        with contextlib.ExitStack() as stack:
            with exits.user_errors():
                claims = load_claims()
                if not options.claims:
                    console.print(verdicts.listing(claims.values()))
                    return 0
                chosen = [choose("claim", name, [*claims, "all"]) for name in options.claims]
                names = claims if "all" in chosen else dict.fromkeys(chosen)
                dataset = load_data(options.dataset, options.data_dir, console)
                check_data(dataset)
                if cache := data.cache_directory():
                    devices.enable_compilation_cache(cache / "programs")
                devices.set_cpu_devices()
                jax.config.update("jax_default_matmul_precision", Experiment.matmul_precision)
                path = rundir.expand(options.out or rundir.default_path("reproduce", dataset.name))
                settings = {
                    name: getattr(options, name) for name in ("quick", "replicates", "seed")
                }
                described = describe(settings, dataset, options.dataset, options.data_dir)
                stack.enter_context(rundir.claim_directory(path, *described))
            print_plain(console, f"directory: {path}")
            run([claims[name] for name in names], options, dataset, path, console, raise_if_stopped)
            if (path / "report.html").exists():
                print_plain(console, f"report: {path / 'report.html'}")
        return 0

    return exits.run(command, lambda: _words(options, path) if path else [])


def check_data(dataset: Dataset) -> None:
    """Refuses data that some claim could not be tried on.

    Raises:
        ValueError: if there are too few images, or a preset would meet a batch of one.
    """
    found = len(dataset.train_labels)
    if found < FEWEST:
        raise ValueError(f"{dataset.name} has {found} training images: claims need {FEWEST}")
    for preset in PRESETS.values():
        preset.check_against(dataset)


def run(
    claims: Sequence[Claim],
    options: Options,
    dataset: Dataset,
    path: Path,
    console: Console,
    raise_if_stopped: Callable[[], None],
) -> None:
    """Runs what is not done yet, prints a line for each claim, and keeps the page up to date.

    Args:
        claims: which to run.
        options: how.
        dataset: on what.
        path: where the results go.
        console: where to show them.
        raise_if_stopped: called after each claim.
    """
    costs = {claim.id: claim.seconds[0 if options.quick else 1] for claim in claims}
    left = [claim for claim in claims if not (path / claim.id / verdicts.EVIDENCE).exists()]
    total = sum(costs[claim.id] for claim in left)
    told = f", {len(claims) - len(left)} done before" if len(left) < len(claims) else ""
    count, duration = f"{len(claims)} claim{'s' * (len(claims) > 1)}", format_seconds(total)
    print_plain(console, f"{count}{told}, about {duration} on two cores")
    settings = Settings(dataset, options.quick, options.replicates, options.seed)
    columns = TextColumn("{task.description}, time left"), TimeRemainingColumn(), BarColumn()
    shown = console.is_terminal
    with Progress(*columns, console=console, disable=not shown, transient=True) as bar:
        task = bar.add_task("", total=total)
        for claim in claims:
            if claim in left:
                bar.update(task, description=claim.id)
                start = time.perf_counter()
                evidence = claim.run(settings)
                verdicts.save(path, claim, evidence, time.perf_counter() - start)
                bar.advance(task, costs[claim.id])
                jax.clear_caches()  # the next claim compiles programs of its own
            print_plain(console, verdicts.format_line(path, claim))
            then = "the same command with --out tries again"
            with exits.optional(console, "the report could not be drawn", then):
                verdicts.write_page(path, shlex.join(_words(options, None)))
            raise_if_stopped()


def _words(options: Options, path: Path | None) -> list[str]:
    """The command that runs the same again, without its claims where there is no path."""
    changed = {
        name: value
        for name, value in vars(options).items()
        if name not in ("claims", "out") and value != getattr(Options, name)
    }
    claims, out = (options.claims, {"out": path}) if path else ((), {})
    return [*PROG.split(), *claims, *flags(changed | out)]


if __name__ == "__main__":
    exits.leave(main())

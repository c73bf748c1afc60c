"""Re-runs what papers, courses and notebooks claim about batch normalization, with verdicts.

    python -m experiments.reproduce                       lists the claims
    python -m experiments.reproduce rank-collapse         runs one, or several
    python -m experiments.reproduce all --quick           runs less of each, minutes in all
    python -m experiments.reproduce all --out DIR         goes on in DIR, if it stopped there

Each claim ends in PASS, FAIL or INCONCLUSIVE, by checks that were written before the run. DIR
holds report.html, which puts published beside measured figures and opens without a network,
verdicts.json, and a directory for each claim with its evidence and its picture.

Exit status: 0 whatever the verdicts; 2 a mistake in the command, the settings or the data;
130 after Ctrl-C, 143 after SIGTERM.
"""

import dataclasses
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.console import Console
from rich.progress import Progress

from bnjax.names import choose
from experiments.claims import Claim, Settings, load_claims, verdicts
from experiments.lab import exits, results, rundir
from experiments.lab.console import print_plain
from experiments.lab.plan import load_data
from experiments.lab.presets import PRESETS, Experiment

FEWEST = 512
PROG = "python -m experiments.reproduce"


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig(results.CommonConfig):
    """What is run; the published figures are MNIST's."""

    claims: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CLAIM"), tyro.conf.Positional] = ()
    """Claims to run, by their ids, or all; none lists them."""

    quick: bool = False
    """Run less of each claim: all of them take minutes."""

    replicates: int | None = None
    """Independent repetitions of each claim, instead of its own number."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory to create, or to go on in; by default runs/reproduce-DATASET-TIME."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Experiment(replicates=1 if self.replicates is None else self.replicates)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    config = tyro.cli(ReproduceConfig, args=arguments, prog=PROG, description=__doc__)
    console = Console()
    again: list[str] = []

    def command(raise_if_stopped: Callable[[], None]) -> None:
        claims = load_claims()
        if not config.claims:
            console.print(verdicts.listing(claims.values()))
            return
        with exits.user_errors():
            chosen = [choose("claim", name, [*claims, "all"]) for name in config.claims]
            names = claims if "all" in chosen else dict.fromkeys(chosen)
            dataset = load_data(config.dataset, config.data_dir, console)
            if (found := len(dataset.train_labels)) < FEWEST:
                raise ValueError(f"{found} training images in {dataset.name}: claims need {FEWEST}")
            for preset in PRESETS.values():
                preset.check_against(dataset)
            path = rundir.expand(config.out or rundir.default_path("reproduce", dataset.name))
        settings = Settings(dataset, config.quick, config.replicates, config.seed)
        decisive = {name: getattr(config, name) for name in ("quick", "replicates", "seed")}
        page_command = results.command(PROG, dataclasses.replace(config, claims=(), out=None))
        results.set_up_jax()
        with results.directory(path, decisive, config, dataset):
            again.extend(results.command(PROG, dataclasses.replace(config, out=path)))
            print_plain(console, f"directory: {path}")
            with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
                for claim in measure([claims[name] for name in names], settings, path, bar):
                    print_plain(console, verdicts.format_line(path, claim))
                    then = "the same command with --out tries again"
                    with exits.optional(console, "the report could not be drawn", then):
                        verdicts.write_page(path, shlex.join(page_command))
                    raise_if_stopped()
            if (path / "report.html").exists():
                print_plain(console, f"report: {path / 'report.html'}")

    return exits.run(command, lambda: again)


def measure(claims: list[Claim], settings: Settings, path: Path, bar: Progress) -> Iterator[Claim]:
    """Says what it is to take, runs what is not done yet, and yields each claim that is."""
    left = [claim for claim in claims if not (path / claim.id / verdicts.EVIDENCE).exists()]
    costs = {claim.id: claim.seconds[0 if settings.quick else 1] for claim in left}
    total, done = sum(costs.values()), len(claims) - len(left)
    count = f"{len(claims)} claim{'s' * (len(claims) > 1)}" + f", {done} done before" * (done > 0)
    print_plain(bar.console, f"{count}, about {verdicts.format_seconds(total)} on two cores")
    task = bar.add_task("", total=total)
    for claim in claims:
        if claim in left:
            bar.update(task, description=claim.id)
            start = time.perf_counter()
            evidence = claim.run(settings)
            verdicts.save(path, claim, evidence, time.perf_counter() - start)
            bar.advance(task, costs[claim.id])
            jax.clear_caches()  # the next claim compiles programs of its own
        yield claim


if __name__ == "__main__":
    exits.leave(main())

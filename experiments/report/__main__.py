"""Draws the report of a run again, from its files alone: after an update, or of a copy."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro
from jinja2 import UndefinedError
from rich.console import Console

from experiments import report
from experiments.lab import exits, rundir
from experiments.lab.console import print_plain, show_warnings

PROG = "python -m experiments.report"
Directory = Annotated[
    Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="Directory of a run that ended.")
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    run = tyro.cli(Directory, args=arguments, prog=PROG, description=__doc__)
    console = Console()

    def command(_: Callable[[], None]) -> None:
        with exits.user_errors(), show_warnings(console, rundir.ReportWarning):
            path = rundir.expand(run)
            try:
                report.redraw(path)
            except (KeyError, UndefinedError) as error:
                raise ValueError(
                    f"the files of {path} lack {error}: another version saved them, or they are "
                    "damaged"
                ) from error
        print_plain(console, f"report: {path / 'report.html'}")

    return exits.run(command)


if __name__ == "__main__":
    exits.leave(main())

"""The main job as a test runs it, and what it leaves."""

import contextlib
import io
from pathlib import Path
from typing import NamedTuple

from experiments import metrics, mnist_bn


class Result(NamedTuple):
    status: int
    out: str
    err: str


def call(*arguments) -> Result:
    """The command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = mnist_bn.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
    return Result(status, out.getvalue(), err.getvalue())


def lines_of(path: Path) -> list[dict]:
    """A run's metrics without `seconds`, the only one that may differ between equal runs."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in metrics.read(path)]

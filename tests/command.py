"""The main job as a test runs it, and what it leaves."""

import contextlib
import io
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np

from experiments import mnist_bn
from experiments.lab import Run
from experiments.report import figures

COSTS = ("train_cost", "train_loss", "test_loss")


class Result(NamedTuple):
    status: int
    out: str
    err: str


def blank_pictures() -> contextlib.AbstractContextManager:
    """Has pictures be empty files, for what does not look at them: they take longest."""
    return mock.patch.multiple(figures, to_png=lambda _: b"", to_svg=lambda _: b"")


def call(*arguments, pictures: bool = False) -> Result:
    """The command in this process, by default with blank pictures."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.nullcontext() if pictures else blank_pictures(),
    ):
        try:
            status = mnist_bn.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
    return Result(status, out.getvalue(), err.getvalue())


def lines_of(path: Path) -> list[dict]:
    """A run's metrics without `seconds`, the only one that may differ between equal runs."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in Run(path).lines]


def assert_same_numbers(path: Path, expected: Path, tolerance: float = 2e-3) -> None:
    """Two runs agree but for rounding, which Adam makes larger."""
    mine, others = Run(path).lines, Run(expected).lines
    assert len(mine) == len(others)
    for a, b in zip(mine, others, strict=True):
        assert (a["epoch"], a["arm"], a["replicate"]) == (b["epoch"], b["arm"], b["replicate"])
        costs = [[line[cost] for cost in COSTS] for line in (a, b)]
        np.testing.assert_allclose(*costs, rtol=tolerance)

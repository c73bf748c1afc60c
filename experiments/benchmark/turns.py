"""Contenders take turns, so that a machine that slows down slows all of them down."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from statistics import median
from typing import Any, TypeVar

import numpy as np

# Of one part: what was measured, as JSON has it, and a table: its title and its rows.
Part = tuple[Any, str, Sequence[Mapping[str, str]]]

T = TypeVar("T")


def interleave(calls: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Calls each contender in turn, `repeats` times; returns their results by name."""
    results: dict[str, list[T]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            results[name].append(call())
    return results


@contextmanager
def own_process(name: str, make: Callable[[], Callable[[], T]]) -> Iterator[Callable[[], T]]:
    """A contender in a process of its own, which shares nothing with others but the machine.

    Args:
        name: of the contender.
        make: makes it there. It is called once, so that it is compiled and warm from then on.

    Raises:
        RuntimeError: if the contender fails; the cause shows where.
    """

    def submit(*work: Any) -> Any:
        try:
            return pool.submit(*work).result()
        except Exception as error:
            raise RuntimeError(f"{name} failed") from error

    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        submit(_make, make)
        yield partial(submit, _call)


_made: list[Callable[[], Any]] = []  # in the contender's process


def _make(make: Callable[[], Callable[[], Any]]) -> None:
    _made.append(make())
    _call()


def _call() -> Any:
    return _made[0]()


def timing(seconds: Sequence[float], unit: str) -> dict[str, str]:
    """Cells of a table: the median in "ms" or "s", and its spread, the distance of the quartiles.

    Example:
        >>> timing([3e-3, 1e-3, 2e-3], "ms")
        {'ms': '2', 'spread': '1'}
    """
    scale = {"ms": 1000, "s": 1}[unit]
    low, high = np.quantile(seconds, (0.25, 0.75))
    return {unit: f"{scale * median(seconds):.3g}", "spread": f"{scale * (high - low):.2g}"}

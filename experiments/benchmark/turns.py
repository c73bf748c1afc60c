"""Contenders take turns, so that a machine that slows down slows all of them down."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

# Of one part: what was measured, as JSON has it, and a table: its title and its rows.
Part = tuple[Any, str, Sequence[Mapping[str, Any]]]


def take_turns(calls: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Calls each contender in turn, `repeats` times; returns the seconds they tell, by name.

    A first turn, in which they compile, does not count.
    """
    turns = [{name: call() for name, call in calls.items()} for _ in range(repeats + 1)]
    return {name: [turn[name] for turn in turns[1:]] for name in calls}


def compare(seconds: Mapping[str, Sequence[float]], unit: str) -> list[dict[str, str]]:
    """Rows of a table: each contender's `timing`, and its median as a multiple of Flax's."""
    flax = np.median(seconds["Flax"])
    return [
        {"": name, **timing(values, unit), "/ Flax": f"{np.median(values) / flax:.2f}"}
        for name, values in seconds.items()
    ]


def timing(seconds: Sequence[float], unit: str) -> dict[str, str]:
    """Cells of a table: the median in "ms" or "s", and its spread, the distance of the quartiles.

    Example:
        >>> timing([3e-3, 1e-3, 2e-3], "ms")
        {'ms': '2', 'spread': '1'}
    """
    scale = {"ms": 1000, "s": 1}[unit]
    low, median, high = scale * np.quantile(seconds, (0.25, 0.5, 0.75))
    return {unit: f"{median:.3g}", "spread": f"{high - low:.2g}"}

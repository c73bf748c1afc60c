"""Choosing by name, with a message that helps where there is no such name."""

import difflib
from collections.abc import Iterable


def choose(what: str, name: str, names: Iterable[str]) -> str:
    """Returns `name` if it is one of `names`.

    Raises:
        ValueError: if it is not, with the nearest name and all of them.

    Example:
        >>> choose("activation", "rleu", ["relu", "tanh"])
        Traceback (most recent call last):
        ValueError: unknown activation 'rleu': did you mean 'relu'? Known: relu, tanh
    """
    names = list(names)
    if name in names:
        return name
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise ValueError(f"unknown {what} {name!r}: {hint}Known: {', '.join(names)}")

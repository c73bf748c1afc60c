"""Choosing by name, with a message that helps where there is no such name."""

import difflib
import re
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


def split_number(name: str) -> tuple[str, int]:
    """Splits `NAME(NUMBER)`; where there is no whole number of one to nine digits, that is 0.

    Example:
        >>> split_number("ghost(25)"), split_number("group(1.5)"), split_number("batch")
        (('ghost', 25), ('group', 0), ('batch', 0))
    """
    family, _, rest = name.partition("(")
    match = re.fullmatch(r"([0-9]{1,9})\)", rest)
    return family, int(match[1]) if match else 0

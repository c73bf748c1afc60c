"""How a command ends: what stops it early becomes one sentence and an exit status."""

import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import jax
from rich.console import Console

from bnjax.errors import CheckpointError
from experiments.console import print_plain


class MistakeError(Exception):
    """Something that the user can put right, in one sentence."""


class Terminated(BaseException):
    """SIGTERM arrived."""


@contextmanager
def mistakes() -> Iterator[None]:
    """Where a `ValueError` is a mistake of the user; elsewhere it is one of ours."""
    try:
        yield
    except ValueError as error:
        raise MistakeError(error) from error


def run(
    command: Callable[[Callable[[], None]], int], how_to_go_on: Callable[[], Sequence[str]]
) -> int:
    """Runs a command and returns its exit status.

    Args:
        command: given what raises if the command is to stop, and is to be called now and then.
        how_to_go_on: the words that start it again where it stopped, none where it cannot go on.
    """
    try:
        with _stopping() as check:
            return command(check)
    except (MistakeError, CheckpointError) as error:
        return _tell(f"error: {error}", 2)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _tell(f"error: {place}{error.strerror or error}", 2, how_to_go_on())
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        told = re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory|Unable to allocate", str(error))
        if not (told or isinstance(error, MemoryError)):
            raise
        hint = "choose smaller networks, a smaller batch or fewer replicates"
        return _tell(f"error: out of memory: {hint}", 2)
    except (KeyboardInterrupt, Terminated) as stop:
        status = 130 if isinstance(stop, KeyboardInterrupt) else 143
        return _tell("stopped", status, how_to_go_on())


def leave(status: int) -> NoReturn:
    """Ends the process; signals would only disturb that."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(status)


def _tell(message: str, status: int, words: Sequence[str] | None = None) -> int:
    hint = f"; go on with: {shlex.join(words)}" if words else ""
    print_plain(Console(stderr=True), message + hint)
    return status


@contextmanager
def _stopping() -> Iterator[Callable[[], None]]:
    """Raises `KeyboardInterrupt` on SIGINT and `Terminated` on SIGTERM, whichever comes first.

    Python drops an exception that leaves a callback, such as those of its garbage collection, and
    the signal with it. The function that this yields raises again what arrived. Further signals
    are ignored, so that they do not disturb the end.
    """
    arrived: list[BaseException] = []

    def check() -> None:
        if arrived:
            raise arrived[0]

    def handle(number: int, _: FrameType | None) -> None:
        for each in previous:
            signal.signal(each, signal.SIG_IGN)
        arrived.append(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
        check()

    def drop(dropped: "sys.UnraisableHookArgs") -> None:
        if dropped.exc_value not in arrived:
            sys.__unraisablehook__(dropped)

    previous = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    sys.unraisablehook, hook = drop, sys.unraisablehook
    try:
        yield check
    finally:
        sys.unraisablehook = hook
        for number, handler in previous.items():
            signal.signal(number, handler)

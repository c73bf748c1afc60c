"""How a command ends: what stops it early becomes one sentence and an exit status."""

import re
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import jax
from rich.console import Console

from bnjax.errors import CheckpointError
from experiments.console import print_plain

SMALLER = "choose smaller --hidden-sizes, a smaller --batch-size or fewer --replicates"


class Terminated(BaseException):
    """SIGTERM arrived."""


def run(
    command: Callable[[Callable[[], None]], int], how_to_go_on: Callable[[], Sequence[str] | None]
) -> int:
    """Runs a command and returns its exit status.

    Args:
        command: given what raises if the command is to stop, and is to be called now and then.
        how_to_go_on: the words that start it again where it stopped; none where it cannot go on;
            None until it has begun to write, from when on a `ValueError` is no mistake of the user.
    """
    try:
        with _stopping() as check:
            return command(check)
    except ValueError as error:
        if how_to_go_on() is not None and not isinstance(error, CheckpointError):
            raise
        return _tell(f"error: {error}", 2)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _tell(f"error: {place}{error.strerror or error}", 2, how_to_go_on())
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory|Unable to allocate", str(error)):
            raise
        return _tell(f"error: out of memory: {SMALLER}", 2)
    except (KeyboardInterrupt, Terminated) as stop:
        status = 130 if isinstance(stop, KeyboardInterrupt) else 143
        return _tell("stopped", status, how_to_go_on())


def _tell(message: str, status: int, words: Sequence[str] | None = None) -> int:
    hint = f"; go on with: {shlex.join(words)}" if words else ""
    print_plain(Console(stderr=True), message + hint)
    return status


@contextmanager
def _stopping() -> Iterator[Callable[[], None]]:
    """Raises `KeyboardInterrupt` on SIGINT and `Terminated` on SIGTERM.

    Python drops an exception that leaves a callback, such as those of its garbage collection, and
    the signal with it. The function that this yields raises again what arrived.
    """
    arrived: list[BaseException] = []

    def check() -> None:
        if arrived:
            raise arrived[0]

    def handle(number: int, _: FrameType | None) -> None:
        arrived.append(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
        check()

    previous = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

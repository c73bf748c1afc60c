"""How a command ends: what stops it early becomes one sentence and an exit status."""

import io
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import jax
from jax.errors import JaxRuntimeError
from rich.console import Console

from bnjax.errors import CheckpointError, shorten
from bnjax.files import WriteError
from bnjax.parallel import processes
from experiments.lab.console import print_plain

# The status of a run that has ended in order, but every replicate of one network diverged.
DIVERGED = 3


class UserError(Exception):
    """Something that the user can put right, in one sentence."""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Where a `ValueError` is a mistake of the user; elsewhere it is one of ours."""
    try:
        yield
    except ValueError as error:
        raise UserError(error) from error


@contextmanager
def optional(console: Console, what: str, then: str) -> Iterator[None]:
    """Where something fails that a run can do without: says what, and what can be done `then`.

    A file that cannot be written, as on a full disk, and lost processes end the run nevertheless.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, WriteError) or processes.is_lost(error):
            raise
        print_plain(console, f"NOTE: {what} ({shorten(error)}): {then}", style="bold yellow")


def run(
    command: Callable[[Callable[[], None]], int | None],
    resume_command: Callable[[], Sequence[str]] = list,
) -> int:
    """Runs a command and returns its exit status, by default 0.

    Args:
        command: is given what raises if it is to stop, to be called now and then.
        resume_command: the words that start it again where it stopped, none where it cannot go on.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ± is no reason to fail
    try:
        with _stopping() as raise_if_stopped:
            return command(raise_if_stopped) or 0
    except (UserError, CheckpointError) as error:
        return _tell(f"error: {error}", 2, by_first=isinstance(error, UserError))
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _tell(f"error: {place}{error.strerror or error}", 2, resume_command())
    except Exception as error:
        if processes.is_lost(error):
            return _tell("error: another process is lost", 1, resume_command())
        told = re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory|Unable to allocate", str(error))
        if isinstance(error, MemoryError) or (isinstance(error, JaxRuntimeError) and told):
            hint = "choose smaller networks, a smaller batch or fewer replicates"
            return _tell(f"error: out of memory: {hint}", 2)
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()  # Python's own end would wait for processes that wait for this one
        return 1
    except KeyboardInterrupt as stop:
        status = 143 if isinstance(stop, Terminated) else 130
        return _tell("stopped", status, resume_command(), by_first=True)


def leave(status: int) -> NoReturn:
    """Ends the process; signals would only disturb that.

    One of several that stops early does not wait for the others: they may be lost, or wait for it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if status not in (0, DIVERGED) and jax.distributed.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
    sys.exit(status)


def _tell(message: str, status: int, words: Sequence[str] = (), *, by_first: bool = False) -> int:
    """Says why the command ends; of several processes each says its own, or the first for all."""
    hint = f"; go on with: {shlex.join(words)}" if words else ""
    first = processes.is_first()
    if first or not by_first:
        who = "" if first else f"{processes.name()}: "
        print_plain(Console(stderr=True), f"{who}{message}{hint}")
    return status


@contextmanager
def _stopping() -> Iterator[Callable[[], None]]:
    """Raises `KeyboardInterrupt` on SIGINT and `Terminated` on SIGTERM, whichever comes first.

    Python drops an exception that leaves a callback, such as those of its garbage collection, and
    the signal with it. The function that this yields raises again what arrived. Further signals
    are ignored, so that they do not disturb the end.
    """
    arrived: list[BaseException] = []

    def raise_if_stopped() -> None:
        if arrived:
            raise arrived[0]

    def handle(number: int, _: FrameType | None) -> None:
        for each in previous:
            signal.signal(each, signal.SIG_IGN)
        arrived.append(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
        raise_if_stopped()

    previous = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    hook = sys.unraisablehook
    sys.unraisablehook = lambda dropped: dropped.exc_value in arrived or hook(dropped)
    try:
        yield raise_if_stopped
    finally:
        sys.unraisablehook = hook
        for number, handler in previous.items():
            signal.signal(number, handler)

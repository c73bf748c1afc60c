"""Stopping a run from outside."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(BaseException):
    """SIGTERM arrived."""


@contextmanager
def stopping() -> Iterator[Callable[[], None]]:
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

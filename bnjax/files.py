"""Writing files, so that one is there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


class WriteError(OSError):
    """A file that cannot be written, by its name."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has errors of the system name a file, as `WriteError`: those of writing do not."""
    try:
        yield
    except OSError as error:
        raise WriteError(error.errno, error.strerror, str(path)) from error


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write under another name, which then takes the place of `path`.

    Raises:
        WriteError: if it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    with naming(path):
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

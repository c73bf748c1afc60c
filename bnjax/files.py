"""Writing files, so that one is there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class WriteError(OSError):
    """A file that cannot be written, by its name."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has errors of the system name a file, as `WriteError`: those of writing do not."""
    try:
        yield
    except OSError as error:
        raise WriteError(error.errno, error.strerror, str(path)) from error


def write(path: Path, content: bytes, *, sync: bool = False) -> None:
    """Writes a file under another name and renames it; makes its directory.

    With `sync` it also outlasts a failure of the machine.

    Raises:
        WriteError: if it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    with naming(path.parent):
        path.parent.mkdir(exist_ok=True)
    with naming(path):
        with partial.open("wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)

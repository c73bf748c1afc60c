"""The IDX file format of the MNIST family, read with every claim of the header checked.

An IDX file is two zero bytes, a type code (8 for unsigned bytes), the number of axes, one
big-endian 32-bit length per axis, and the values. Files may be gzipped: their first two bytes
tell, not their names, since browsers unpack what they save and other tools drop a `.gz`.
"""

import contextlib
import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

import numpy as np

from bnjax.errors import DataError

UNSIGNED_BYTE = 8
GZIP = b"\x1f\x8b"

# Deflate cannot pack more than 1,032 bytes into one (RFC 1951: 258 bytes in two bits).
MAX_INFLATION = 1032
CHUNK = 2**20


def read_images(path: Path) -> np.ndarray:
    """Reads gray images.

    Args:
        path: an IDX file, gzipped or not.

    Returns:
        `[N, 28, 28]` uint8.

    Raises:
        DataError: if the file cannot be read, is not an IDX file of such images, or is shorter or
            longer than its header says.
    """
    images = _read(path, rank=3)
    if images.shape[1:] != (28, 28):
        raise DataError(
            f"{path}: the images are {images.shape[1]}x{images.shape[2]}, expected 28x28"
        )
    return images


def read_labels(path: Path) -> np.ndarray:
    """Reads class labels.

    Args:
        path: an IDX file, gzipped or not.

    Returns:
        `[N]` int32 in 0..9.

    Raises:
        DataError: as `read_images`, or if a label is above 9.
    """
    labels = _read(path, rank=1).astype(np.int32)
    if labels.size and labels.max() > 9:
        where = int(np.argmax(labels > 9))
        raise DataError(f"{path}: label {labels[where]} at index {where}, expected 0 to 9")
    return labels


def sha256(values: np.ndarray) -> str:
    """SHA-256 of the IDX file, not gzipped, that holds these images or labels."""
    header = struct.pack(f">HBB{values.ndim}I", 0, UNSIGNED_BYTE, values.ndim, *values.shape)
    digest = hashlib.sha256(header)
    digest.update(np.ascontiguousarray(values, np.uint8).data)
    return digest.hexdigest()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BufferedReader]:
    """Opens a file; what goes wrong while it is read is a `DataError` that names it."""
    try:
        if path.is_fifo() or path.is_char_device() or path.is_block_device():
            raise DataError(f"{path}: cannot be read: it is a pipe or a device, expected a file")
        with path.open("rb") as file:
            yield file
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: corrupt or truncated gzip stream ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read(path: Path, rank: int) -> np.ndarray:
    with reading(path) as raw:
        zipped = raw.peek(2).startswith(GZIP)
        limit = path.stat().st_size * (MAX_INFLATION if zipped else 1)
        file: BufferedReader | gzip.GzipFile = gzip.GzipFile(fileobj=raw) if zipped else raw
        header = file.read(4 + 4 * rank)
        magic = bytes([0, 0, UNSIGNED_BYTE, rank])
        if header[:4] != magic:
            raise DataError(
                f"{path}: magic number {header[:4].hex() or 'missing'}, expected {magic.hex()} "
                f"(an IDX file of unsigned bytes with {rank} {'axes' if rank > 1 else 'axis'})"
            )
        if len(header) < 4 + 4 * rank:
            raise DataError(f"{path}: truncated, the header ends after {len(header)} bytes")
        shape = struct.unpack(f">{rank}I", header[4:])
        size = math.prod(shape)
        announced = f"the header announces {'x'.join(map(str, shape))} = {size} bytes"
        if size > limit:
            problem = "more than a file of this size can hold"
            raise DataError(f"{path}: truncated, {announced}, {problem}")
        values = bytearray()  # grows as bytes come: a header may announce what does not follow
        while part := file.read(min(CHUNK, size + 1 - len(values))):
            values += part
    if len(values) < size:
        raise DataError(f"{path}: truncated, {announced}, found {len(values)}")
    if len(values) > size:
        raise DataError(f"{path}: oversized, {announced}, found more")
    return np.frombuffer(values, np.uint8).reshape(shape)

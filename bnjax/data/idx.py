"""The IDX file format of the MNIST family, read with every claim of the header checked.

An IDX file is two zero bytes, a type code (8 for unsigned bytes), the number of axes, one
big-endian 32-bit length per axis, and the values. Files may be gzipped: their first two bytes
tell, not their names, since browsers unpack what they save and other tools drop a `.gz`.
"""

import gzip
import hashlib
import math
import struct
import zlib
from io import BufferedReader
from pathlib import Path

import numpy as np

from bnjax.errors import DataError

UNSIGNED_BYTE = 8
GZIP = b"\x1f\x8b"
CHUNK = 2**18


def read_images(path: Path) -> np.ndarray:
    """Gray images `[N, 28, 28]` uint8 of an IDX file, gzipped or not.

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
    """Class labels `[N]` int32 in 0..9, read as images are; `DataError` if one is above 9."""
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


def _read(path: Path, rank: int) -> np.ndarray:
    try:
        with path.open("rb") as raw:
            zipped = raw.peek(2).startswith(GZIP)
            return _parse(path, gzip.GzipFile(fileobj=raw) if zipped else raw, rank)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: corrupt or truncated gzip stream ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _parse(path: Path, file: BufferedReader | gzip.GzipFile, rank: int) -> np.ndarray:
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
    values = bytearray()  # grows as bytes come: a header may announce what does not follow
    while part := file.read(min(CHUNK, size + 1 - len(values))):
        values += part
    if len(values) != size:
        problem, found = ("truncated", len(values)) if len(values) < size else ("oversized", "more")
        announced = f"the header announces {'x'.join(map(str, shape))} = {size} bytes"
        raise DataError(f"{path}: {problem}, {announced}, found {found}")
    return np.frombuffer(values, np.uint8).reshape(shape)

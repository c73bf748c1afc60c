"""Datasets of 28x28 gray images in ten classes, from files, TFDS, a download or scikit-learn.

`load` looks in this order, and the first place that has the dataset serves it:

1. the directory given, or `$BNJAX_DATA_DIR`: the four IDX files, gzipped or not, lying flat or as
   torchvision or Kaggle arranges them, or a dataset that TFDS prepared there;
2. a dataset that TFDS prepared in its own directory, as ArrayRecord;
3. `$XDG_CACHE_HOME/bnjax/datasets`, filled by a download the first time.

A directory that was named is never passed over: if it lacks the dataset, that is an error.

Of several names of one file the first counts: `train-images-idx3-ubyte`, the same with `.gz`,
`train-images.idx3-ubyte`, and that with `.gz`. A directory of such a name, as Kaggle's archive has
it, counts only where there is no file, for the file of the same name inside.
"""

import contextlib
import difflib
import hashlib
import os
import tomllib
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bnjax.data import download, idx, prepared
from bnjax.errors import DataError, DataWarning, DownloadError
from bnjax.names import choose

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
SOURCES = tomllib.loads(Path(__file__).with_name("sources.toml").read_text(encoding="utf-8"))
NAMES = ("auto", *SOURCES, "digits")


class Dataset(NamedTuple):
    """Attributes: `name`, then train and test images `[N, 28, 28]` uint8 and labels `[N]` int32."""

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """Loads a dataset.

    Args:
        name: `mnist`, `fashion_mnist`, `kmnist`, `digits` (scikit-learn's 1,797 real digits,
            embedded, 8x8 resized to 28x28, the first 1,437 for training), or `auto`: MNIST where
            it can be had, otherwise `digits` with a `DataWarning`.
        data_dir: where to look; `$BNJAX_DATA_DIR` if not given. `digits` needs none.

    Raises:
        ValueError: if there is no dataset of that name.
        DataError: if the dataset is missing from the directory named, is damaged or belongs to
            another dataset; `DownloadError` if it cannot be downloaded.

    Example:
        >>> load("digits").train_images.shape
        (1437, 28, 28)
    """
    choose("dataset", name, NAMES)
    if name == "digits":
        return _digits()
    wanted = "mnist" if name == "auto" else name
    if data_dir:
        return _from_directory(wanted, Path(data_dir))
    if told := os.environ.get("BNJAX_DATA_DIR"):
        try:
            return _from_directory(wanted, Path(told))
        except DataError as error:
            raise DataError(f"{error}; $BNJAX_DATA_DIR says to look there") from error
    try:
        directory = prepared.default_directory()
        if arrays := prepared.read(wanted, directory):
            return _checked(wanted, directory, arrays)
    except DataError as error:
        warnings.warn(f"{error}; it is passed over", DataWarning, stacklevel=2)
    try:
        return _downloaded(wanted)
    except DownloadError as error:
        if name != "auto":
            raise
        warnings.warn(
            f"{error}. The 1,797 digits embedded in scikit-learn take its place: the numbers are "
            "not comparable with MNIST's.",
            DataWarning,
            stacklevel=2,
        )
        return _digits()


def fingerprint(dataset: Dataset) -> str:
    """SHA-256 of the images and labels, whatever files they came from."""
    digest = hashlib.sha256()
    for array in dataset[1:]:
        digest.update(f"{array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def cache_directory() -> Path | None:
    """`$XDG_CACHE_HOME/bnjax`, by default `~/.cache/bnjax`; None for a user without a home."""
    with contextlib.suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bnjax"
    return None


def _from_directory(name: str, directory: Path) -> Dataset:
    try:
        directory = directory.expanduser()
        places = [directory, directory / SOURCES[name]["torchvision"] / "raw"]
        if not directory.is_dir():
            problem = "not a directory" if directory.exists() else "no such directory"
            raise DataError(f"{directory}: {problem}; expected the IDX files of {name}")
        for place in places:
            paths = {file: path for file in FILES if (path := _find(file, place))}
            if missing := [file for file in FILES if paths and file not in paths]:
                raise DataError(
                    f"{place}: {missing[0]}[.gz] is missing or no file, though others are there"
                    f"{_near_miss(missing, place)}"
                )
            if paths:
                return _checked(name, place, [_read_own(name, *one) for one in paths.items()])
    except (OSError, RuntimeError) as error:
        raise DataError(f"{directory}: this directory cannot be read ({error})") from error
    if arrays := prepared.read(name, directory):
        return _checked(name, directory, arrays)
    raise DataError(
        f"{directory}: {name} is not here; expected {FILES[0]}[.gz] and the other three IDX files "
        f"there or in {places[1].relative_to(directory)}{_near_miss(FILES, *places)}"
    )


def _find(file: str, place: Path) -> Path | None:
    dotted = file.replace("-idx", ".idx")
    paths = [place / name for name in (file, f"{file}.gz", dotted, f"{dotted}.gz")]
    nested = [path / path.name for path in paths]
    return next((path for path in paths + nested if path.is_file()), None)


def _near_miss(missing: Collection[str], *places: Path) -> str:
    """A hint at the first name there that is nearer to a missing file than to the others."""
    near = (path.name for place in places for path in place.glob("[!.]*") if path.is_file())
    for name in sorted(near):
        for file in difflib.get_close_matches(name.lower(), FILES, n=1):
            if file in missing:
                return f"; if {name!r} is {file}, rename it"
    return ""


def _read_own(name: str, file: str, path: Path) -> np.ndarray:
    """Reads a file, unless a checksum, its own or its content's, says that it is another one."""
    values = idx.read_images(path) if "images" in file else idx.read_labels(path)
    checksums = {
        sha256: (other, known.removesuffix(".gz"))
        for other, source in SOURCES.items()
        for known, sha256 in source["sha256"].items()
    }
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest not in checksums:  # perhaps gzipped anew
        digest = idx.sha256(values)
    other, known = checksums.get(digest, (name, file))
    if (other, known) != (name, file):
        todo = "rename it" if other == name else f"choose --dataset {other} or replace the file"
        raise DataError(
            f"{path}: by its checksum this is {known} of {other}, expected {file} of {name}: {todo}"
        )
    return values


def _checked(name: str, directory: Path, arrays: Sequence[np.ndarray]) -> Dataset:
    for split, images, labels in (("training", *arrays[:2]), ("test", *arrays[2:])):
        if len(images) != len(labels) or not len(images):
            raise DataError(
                f"{directory}: {len(images)} {split} images and {len(labels)} {split} labels, "
                "expected as many of one as of the other, and at least one"
            )
    return Dataset(name, *arrays)


def _downloaded(name: str) -> Dataset:
    source, cache = SOURCES[name], cache_directory()
    try:
        if cache is None:
            raise DataError(
                "there is no home directory to keep it in and $XDG_CACHE_HOME is not set"
            )
        directory = cache / "datasets" / name
        zipped = {f"{file}.gz": source["sha256"][f"{file}.gz"] for file in FILES}
        download.fetch(source["url"], zipped, directory)
    except DataError as error:
        raise DownloadError(
            f"{name} cannot be downloaded: {error}; put its four IDX files into a directory and "
            "name that with --data-dir or $BNJAX_DATA_DIR"
        ) from error
    return _from_directory(name, directory)


def _digits() -> Dataset:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = np.round(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]
    bilinear = Image.Resampling.BILINEAR
    images = np.stack([np.asarray(Image.fromarray(i).resize((28, 28), bilinear)) for i in small])
    labels = digits.target.astype(np.int32)
    return Dataset("digits", images[:1437], labels[:1437], images[1437:], labels[1437:])

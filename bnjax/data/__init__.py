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
import tempfile
import warnings
from collections.abc import Collection
from dataclasses import dataclass
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


class Dataset(NamedTuple):
    """Attributes: `name`, then train and test images `[N, 28, 28]` uint8 and labels `[N]` int32."""

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


@dataclass(frozen=True)
class Source:
    """Where a dataset lives and how its files are recognized.

    Attributes:
        url: folder of the gzipped files, as TFDS 4.9.10 registers it.
        torchvision: the folder in which torchvision keeps them.
        sizes: bytes of each gzipped file, in the order of `FILES`.
        sha256: checksum of each gzipped file.
        unzipped_sha256: checksum of each file without gzip, where known.
    """

    url: str
    torchvision: str
    sizes: tuple[int, ...]
    sha256: tuple[str, ...]
    unzipped_sha256: tuple[str, ...] = ()


SOURCES = {
    "mnist": Source(
        url="https://storage.googleapis.com/cvdf-datasets/mnist/",
        torchvision="MNIST",
        sizes=(9912422, 28881, 1648877, 4542),
        sha256=(
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
        unzipped_sha256=(
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
    "fashion_mnist": Source(
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        torchvision="FashionMNIST",
        sizes=(26421880, 29515, 4422102, 5148),
        sha256=(
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
        unzipped_sha256=(
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    ),
    "kmnist": Source(
        url="http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        torchvision="KMNIST",
        sizes=(18165135, 29497, 3041136, 5120),
        sha256=(
            "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
            "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
            "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
            "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
        ),
    ),
}

NAMES = ("auto", *SOURCES, "digits")


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
        if dataset := _prepared(wanted, prepared.default_directory()):
            return dataset
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
        places = [directory, directory / SOURCES[name].torchvision / "raw"]
        if not directory.is_dir():
            problem = "not a directory" if directory.exists() else "no such directory"
            raise DataError(f"{directory}: {problem}; expected the IDX files of {name}")
        for place in places:
            present = {entry.name for entry in place.iterdir()} if place.is_dir() else set()
            paths = {file: path for file in FILES if (path := _find(file, place, present))}
            if paths:
                return _from_idx_files(name, place, paths)
    except PermissionError as error:
        raise DataError(f"{error.filename}: no permission to read this path") from error
    except (OSError, RuntimeError) as error:
        raise DataError(f"{directory}: this directory cannot be read ({error})") from error
    if dataset := _prepared(name, directory):
        return dataset
    raise DataError(
        f"{directory}: {name} is not here; expected {FILES[0]}[.gz] and the other three IDX files "
        f"there or in {places[1].relative_to(directory)}{_near_miss(FILES, *places)}"
    )


def _find(file: str, place: Path, present: set[str]) -> Path | None:
    dotted = file.replace("-idx", ".idx")
    names = (file, f"{file}.gz", dotted, f"{dotted}.gz")
    paths = [place / name for name in names if name in present]
    nested = [path / path.name for path in paths]
    files = [path for path in paths + nested if path.is_file()]
    return next(iter(files + paths), None)


def _near_miss(missing: Collection[str], *places: Path) -> str:
    """A hint at the first name there that is nearer to a missing file than to the others."""
    for name in sorted(path.name for place in places for path in place.glob("[!.]*")):
        for file in difflib.get_close_matches(name.lower(), FILES, n=1):
            if file in missing:
                return f"; if {name!r} is {file}, rename it"
    return ""


def _from_idx_files(name: str, directory: Path, paths: dict[str, Path]) -> Dataset:
    for file in FILES:
        if file not in paths:
            raise DataError(
                f"{directory}: {file}[.gz] is missing, though other files are there"
                f"{_near_miss([file], directory)}"
            )
    dataset = Dataset(name, *(_read_own(name, file, paths[file]) for file in FILES))
    _check_lengths(dataset, directory)
    return dataset


def _read_own(name: str, file: str, path: Path) -> np.ndarray:
    """Reads a file, unless a checksum, its own or its content's, says that it is another one."""
    digest, source = _sha256(path), SOURCES[name]
    _refuse_foreign(name, file, path, digest)
    values = idx.read_images(path) if "images" in file else idx.read_labels(path)
    if digest not in source.sha256 + source.unzipped_sha256:  # perhaps gzipped anew
        _refuse_foreign(name, file, path, idx.sha256(values))
    return values


def _refuse_foreign(name: str, file: str, path: Path, digest: str) -> None:
    for other, source in SOURCES.items():
        known = dict(zip(source.sha256, FILES, strict=True))
        known |= dict(zip(source.unzipped_sha256, FILES, strict=False))
        if digest in known and (other, known[digest]) != (name, file):
            todo = "rename it" if other == name else f"choose --dataset {other} or replace the file"
            raise DataError(
                f"{path}: by its checksum this is {known[digest]} of {other}, expected {file} of "
                f"{name}: {todo}"
            )


def _check_lengths(dataset: Dataset, directory: Path) -> None:
    for split, images, labels in (
        ("training", dataset.train_images, dataset.train_labels),
        ("test", dataset.test_images, dataset.test_labels),
    ):
        if len(images) != len(labels) or not len(images):
            raise DataError(
                f"{directory}: {len(images)} {split} images and {len(labels)} {split} labels, "
                "expected as many of one as of the other, and at least one"
            )


def _sha256(path: Path) -> str:
    with idx.reading(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _prepared(name: str, directory: Path) -> Dataset | None:
    splits = prepared.read(name, directory)
    if splits is None:
        return None
    dataset = Dataset(name, *splits)
    _check_lengths(dataset, directory)
    return dataset


def _downloaded(name: str) -> Dataset:
    source, cache = SOURCES[name], cache_directory()
    files = [f"{file}.gz" for file in FILES]
    try:
        if cache is None:
            raise DataError(
                "there is no home directory to keep it in and $XDG_CACHE_HOME is not set"
            )
        directory = cache / "datasets" / name
        directory.mkdir(parents=True, exist_ok=True)
        missing = [
            (source.url + file, size, sha256)
            for file, size, sha256 in zip(files, source.sizes, source.sha256, strict=True)
            if not (directory / file).is_file() or _sha256(directory / file) != sha256
        ]
        for file in missing:
            with tempfile.TemporaryDirectory(dir=directory) as temporary:
                download.fetch([file], Path(temporary), directory)
    except (OSError, DataError) as error:
        raise DownloadError(
            f"{name} cannot be downloaded: {error}; put its four IDX files into a directory and "
            "name that with --data-dir or $BNJAX_DATA_DIR"
        ) from error
    return _from_idx_files(name, directory, {file: directory / f"{file}.gz" for file in FILES})


def _digits() -> Dataset:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = np.round(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]
    bilinear = Image.Resampling.BILINEAR
    images = np.stack([np.asarray(Image.fromarray(i).resize((28, 28), bilinear)) for i in small])
    labels = digits.target.astype(np.int32)
    return Dataset("digits", images[:1437], labels[:1437], images[1437:], labels[1437:])

"""Every place a dataset may lie in, and every way it may be wrong."""

import gzip
import hashlib
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from factories import idx, locked, noise
from PIL import Image
from sklearn.datasets import load_digits

from bnjax.data import FILES, SOURCES, Dataset, download, fingerprint, load
from bnjax.data.idx import read_images, read_labels
from bnjax.errors import DataError, DataWarning, DownloadError

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = FILES


def write(directory: Path, contents: dict[str, bytes], zipped: tuple[str, ...] = ()) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for file, content in contents.items():
        if file in zipped:
            (directory / f"{file}.gz").write_bytes(gzip.compress(content, 1))
        else:
            (directory / file).write_bytes(content)
    return directory


def idx_files(arrays: tuple[np.ndarray, ...]) -> dict[str, bytes]:
    return dict(zip(FILES, map(idx, arrays), strict=True))


def assert_holds(dataset: Dataset, arrays: tuple[np.ndarray, ...]) -> None:
    for found, expected, dtype in zip(dataset[1:], arrays, ("uint8", "int32") * 2, strict=True):
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, expected)


@pytest.fixture
def arrays():
    return noise(20, 10)


@pytest.fixture
def files(arrays):
    return idx_files(arrays)


@pytest.mark.parametrize("zipped", [(), FILES, FILES[::2]], ids=["plain", "gzipped", "mixed"])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
@pytest.mark.parametrize("flat", [True, False], ids=["flat", "torchvision"])
def test_four_idx_files_load(tmp_path, arrays, files, name, flat, zipped):
    folder = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}[name]
    write(tmp_path if flat else tmp_path / folder / "raw", files, zipped)
    dataset = load(name, tmp_path)
    assert dataset.name == name
    assert_holds(dataset, arrays)


def dotted(file: str) -> str:
    return file.replace("-idx", ".idx")


@pytest.mark.parametrize("folder", [".", "MNIST/raw"])
@pytest.mark.parametrize(
    ("name", "pack"),
    [
        pytest.param(lambda file: file, gzip.compress, id="gzipped without .gz"),
        pytest.param(lambda file: f"{file}.gz", bytes, id="plain with .gz"),
        pytest.param(dotted, bytes, id="dot"),
        pytest.param(dotted, gzip.compress, id="dot gzipped without .gz"),
        pytest.param(lambda file: f"{dotted(file)}.gz", bytes, id="dot plain with .gz"),
        pytest.param(lambda file: f"{dotted(file)}.gz", gzip.compress, id="dot gzipped"),
        pytest.param(lambda file: f"{file}/{file}", bytes, id="inside a directory"),
        pytest.param(
            lambda file: f"{dotted(file)}.gz/{dotted(file)}.gz", gzip.compress, id="and gzipped"
        ),
        pytest.param(
            lambda file: dotted(file) if "images" in file else f"{file}.gz",
            gzip.compress,
            id="mixed",
        ),
    ],
)
def test_files_are_found_under_the_names_that_people_have(
    tmp_path, arrays, files, folder, name, pack
):
    for file, content in files.items():
        path = tmp_path / folder / name(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pack(content))
    assert_holds(load("mnist", tmp_path), arrays)


def test_first_of_several_names_counts(tmp_path, arrays, files):
    """In this order: with a hyphen, that gzipped, with a dot, that gzipped, in a directory."""
    (tmp_path / TRAIN_IMAGES).mkdir()
    names = (f"{TRAIN_IMAGES}/{TRAIN_IMAGES}", f"{dotted(TRAIN_IMAGES)}.gz", dotted(TRAIN_IMAGES))
    names += (f"{TRAIN_IMAGES}.gz",)
    del files[TRAIN_IMAGES]
    write(tmp_path, files)
    for seed, name in enumerate(names, 1):
        images = noise(20, 10, seed=seed)[0]
        (tmp_path / name).write_bytes(idx(images))
        assert_holds(load("mnist", tmp_path), (images, *arrays[1:]))
    shutil.rmtree(tmp_path / TRAIN_IMAGES)
    write(tmp_path, {TRAIN_IMAGES: idx(arrays[0])})
    assert_holds(load("mnist", tmp_path), arrays)


def test_torchvision_folders_of_several_datasets_lie_side_by_side(tmp_path, files):
    other = noise(20, 10, seed=1)
    write(tmp_path / "MNIST" / "raw", files)
    write(tmp_path / "KMNIST" / "raw", idx_files(other))
    assert_holds(load("kmnist", tmp_path), other)


@pytest.mark.parametrize(
    ("argument", "environment"),
    [(None, "{home}/here"), ("{home}/here", "{home}/missing"), ("~/here", ""), (None, "~/here")],
    ids=["environment", "argument goes before", "tilde", "tilde in the environment"],
)
@pytest.mark.parametrize("name", ["auto", "mnist"])
def test_directory_is_named(tmp_path, monkeypatch, arrays, files, name, argument, environment):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BNJAX_DATA_DIR", environment.format(home=tmp_path))
    write(tmp_path / "here", files)
    dataset = load(name, argument and argument.format(home=tmp_path))
    assert dataset.name == "mnist"
    assert_holds(dataset, arrays)


@pytest.mark.parametrize("name", ["auto", "mnist", "kmnist"])
@pytest.mark.parametrize(
    ("directory", "message"),
    [
        ("missing", "missing: no such directory"),
        ("empty", "empty: k?mnist is not here"),
        ("file", "file: not a directory"),
    ],
)
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_named_directory_without_the_dataset_is_refused(
    tmp_path, monkeypatch, name, directory, message, by
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("BNJAX_DATA_DIR", str(tmp_path / directory))
    with pytest.raises(DataError, match=message):
        load(name, tmp_path / directory if by == "argument" else None)


@pytest.mark.parametrize("folder", [".", "MNIST/raw"])
@pytest.mark.parametrize("missing", FILES)
@pytest.mark.parametrize("name", ["auto", "mnist"])
def test_missing_file_is_named(tmp_path, files, folder, missing, name):
    directory = write(tmp_path / folder, files)
    (directory / missing).unlink()
    with pytest.raises(DataError, match=rf"{directory}: {missing}\[\.gz\] is missing"):
        load(name, tmp_path)


NEAR_MISSES = [
    ("train_images-idx3-ubyte", TRAIN_IMAGES),
    ("Train-Images-idx3-ubyte", TRAIN_IMAGES),
    ("emnist-digits-train-images-idx3-ubyte.gz", TRAIN_IMAGES),
    ("TRAIN-LABELS.IDX1-UBYTE.GZ", TRAIN_LABELS),
    ("train-labels-idx1-ubyte.gz.download", TRAIN_LABELS),
    ("test-images-idx3-ubyte", TEST_IMAGES),
    ("t10k-images-idx3-ubyte 2", TEST_IMAGES),
    ("t10k-labels-idx1-ubyte (1).gz", TEST_LABELS),
    ("t10k-labels", TEST_LABELS),
]


@pytest.mark.parametrize("folder", [".", "MNIST/raw"])
@pytest.mark.parametrize("others", [True, False], ids=["beside the others", "alone"])
@pytest.mark.parametrize(("near", "file"), NEAR_MISSES)
def test_near_miss_is_named(tmp_path, files, near, file, others, folder):
    content = files.pop(file)
    write(tmp_path / folder, {**(files if others else {}), near: content, "README.md": b""})
    with pytest.raises(DataError) as caught:
        load("mnist", tmp_path)
    assert str(caught.value).endswith(f"; if {near!r} is {file}, rename it")


@pytest.mark.parametrize("others", [True, False], ids=["beside the others", "alone"])
@pytest.mark.parametrize(
    "far", ["README.md", "train.csv", "mnist.npz", "._train-images-idx3-ubyte"]
)
def test_nothing_else_is_taken_for_a_near_miss(tmp_path, files, far, others):
    del files[TRAIN_IMAGES]
    with pytest.raises(DataError, match=r"is missing or no file, though|is not here") as caught:
        load("mnist", write(tmp_path, {**(files if others else {}), far: b""}))
    assert "rename" not in str(caught.value)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzipped"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (TRAIN_IMAGES, lambda b: b"\0\0\x0d\3" + b[4:], "magic number 00000d03, expected 00000803"),
        (TEST_LABELS, lambda b: b"\1" + b[1:], "magic number 01000801, expected 00000801"),
        (TRAIN_LABELS, lambda _: idx(noise(20, 10)[0]), "magic number 00000803, expected 000008"),
        (TEST_IMAGES, lambda _: idx(noise(20, 10)[1]), "magic number 00000801, expected 000008"),
        (TRAIN_IMAGES, lambda b: gzip.compress(gzip.compress(b)), "magic number 1f8b"),
        (TRAIN_IMAGES, lambda _: b"<!DOCTYPE html>", "magic number 3c21444f, expected 00000803"),
        (TRAIN_IMAGES, lambda _: b"", "magic number missing"),
        (TRAIN_IMAGES, lambda b: b[:3], "magic number 000008, expected"),
        (TRAIN_IMAGES, lambda b: b[:15], "truncated, the header ends after 15 bytes"),
        (TRAIN_LABELS, lambda b: b[:4], "truncated, the header ends after 4 bytes"),
        (TEST_IMAGES, lambda b: b[:16], "truncated, the header announces 10x28x28 = 7840 bytes"),
        (TRAIN_IMAGES, lambda b: b[:-1], "truncated, .* 20x28x28 = 15680 bytes, found 15679"),
        (TEST_LABELS, lambda b: b[:-1], "truncated, .* 10 = 10 bytes, found 9"),
        (TEST_IMAGES, lambda b: b + b"\0", "oversized, .* 10x28x28 = 7840 bytes, found more"),
        (TRAIN_LABELS, lambda b: b + b"\0", "oversized, .* 20 = 20 bytes, found more"),
        (TRAIN_LABELS, lambda b: b[:11] + b"\x0a" + b[12:], "label 10 at index 3, expected 0 to 9"),
        (TEST_LABELS, lambda b: b[:-1] + b"\xff", "label 255 at index 9, expected 0 to 9"),
        (TRAIN_IMAGES, lambda _: idx(np.zeros((20, 32, 32), np.uint8)), "are 32x32, expected"),
        (TEST_IMAGES, lambda _: idx(np.zeros((10, 28, 27), np.uint8)), "are 28x27, expected 28x28"),
        (TEST_IMAGES, lambda _: idx(np.zeros((10, 28, 0), np.uint8)), "are 28x0, expected 28x28"),
    ],
)
def test_damaged_file_is_named(tmp_path, files, file, damage, message, suffix, pack):
    files[f"{file}{suffix}"] = pack(damage(files.pop(file)))
    with pytest.raises(DataError, match=f"{tmp_path}/{file}{suffix}: .*{message}"):
        load("mnist", write(tmp_path, files))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda stream: stream[: len(stream) // 2],
        lambda stream: stream[:-1],
        lambda stream: stream[:-12] + bytes([stream[-12] ^ 1]) + stream[-11:],
        lambda stream: stream[:10] + b"\xff" + stream[11:],
        lambda stream: stream[:-8] + bytes(8),
        lambda stream: stream + b"more",
    ],
    ids=["half", "cut", "flipped bit", "bad block", "bad checksum", "trailing bytes"],
)
@pytest.mark.parametrize("suffix", [".gz", ""])
def test_damaged_gzip_stream_is_named(tmp_path, files, file, damage, suffix):
    path = write(tmp_path, files) / f"{file}{suffix}"
    (tmp_path / file).unlink()
    path.write_bytes(damage(gzip.compress(files[file], 1)))
    with pytest.raises(DataError, match=f"{path}: corrupt or truncated gzip stream"):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("split", "image_file", "images", "labels"),
    [
        ("training", TRAIN_IMAGES, 20, 19),
        ("training", TRAIN_IMAGES, 0, 20),
        ("training", TRAIN_IMAGES, 0, 0),
        ("test", TEST_IMAGES, 9, 10),
        ("test", TEST_IMAGES, 10, 0),
        ("test", TEST_IMAGES, 0, 0),
    ],
)
def test_lengths_that_disagree_or_are_zero_are_refused(
    tmp_path, files, split, image_file, images, labels
):
    files[image_file] = idx(np.zeros((images, 28, 28), np.uint8))
    files[image_file.replace("images-idx3", "labels-idx1")] = idx(np.zeros(labels, np.uint8))
    message = f"{tmp_path}: {images} {split} images and {labels} {split} labels"
    with pytest.raises(DataError, match=message):
        load("mnist", write(tmp_path, files))


@pytest.mark.parametrize("name", [TRAIN_IMAGES, f"{TRAIN_IMAGES}.gz", dotted(TRAIN_IMAGES)])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_something_else_in_place_of_a_file_is_none(tmp_path, files, name, make):
    del files[TRAIN_IMAGES]
    make(write(tmp_path, files) / name)
    with pytest.raises(
        DataError, match=rf"{TRAIN_IMAGES}\[.gz\] is missing or no file, though .* there$"
    ):
        load("mnist", tmp_path)


@pytest.mark.parametrize("read", [read_images, read_labels])
def test_file_that_is_gone_is_named(tmp_path, read):
    with pytest.raises(DataError, match=f"{tmp_path}/gone: cannot be read: No such file"):
        read(tmp_path / "gone")


@pytest.mark.parametrize("name", ["auto", "mnist"])
@pytest.mark.parametrize("lock", [".", "data", "data/MNIST", "data/MNIST/raw"])
def test_directory_without_permission_is_named(public_path, files, lock, name):
    write(public_path / "data" / "MNIST" / "raw", files)
    with (
        locked(public_path / lock),
        pytest.raises(
            DataError,
            match=f"{public_path / 'data'}.*: this directory cannot be read .*Permission denied",
        ),
    ):
        load(name, public_path / "data")


def test_file_without_permission_is_named(public_path, files):
    write(public_path, files)
    with (
        locked(public_path / TEST_LABELS),
        pytest.raises(DataError, match=f"{TEST_LABELS}: cannot be read: Permission denied"),
    ):
        load("mnist", public_path)


def sha256(contents: dict[str, bytes]) -> dict[str, str]:
    return {file: hashlib.sha256(content).hexdigest() for file, content in contents.items()}


@pytest.fixture
def registered(monkeypatch, files):
    """`files` as those of Fashion-MNIST, of which the official ones are gzipped."""
    zipped = {f"{file}.gz": gzip.compress(content, mtime=0) for file, content in files.items()}
    source = {**SOURCES["fashion_mnist"], "sha256": sha256(zipped | files)}
    monkeypatch.setitem(SOURCES, "fashion_mnist", source)
    return files


PACKINGS = {
    "official": lambda content: gzip.compress(content, mtime=0),
    "unpacked": bytes,
    "gzipped anew": lambda content: gzip.compress(content, 1, mtime=1),
}


@pytest.mark.parametrize("suffix", [".gz", ""])
@pytest.mark.parametrize("pack", PACKINGS.values(), ids=PACKINGS)
@pytest.mark.parametrize("name", ["auto", "mnist", "kmnist"])
@pytest.mark.parametrize("file", FILES)
def test_file_of_another_dataset_is_refused_with_its_name(
    tmp_path, registered, file, name, pack, suffix
):
    own = idx_files(noise(20, 10, seed=1))
    del own[file]
    path = write(tmp_path, own) / f"{file}{suffix}"
    path.write_bytes(pack(registered[file]))
    with pytest.raises(DataError) as caught:
        load(name, tmp_path)
    assert str(caught.value) == (
        f"{path}: by its checksum this is {file} of fashion_mnist, expected {file} of "
        f"{'mnist' if name == 'auto' else name}: choose --dataset fashion_mnist or replace the file"
    )


@pytest.mark.parametrize("pack", PACKINGS.values(), ids=PACKINGS)
def test_file_of_the_dataset_itself_is_read_however_packed(tmp_path, arrays, registered, pack):
    for file, content in registered.items():
        (tmp_path / f"{file}.gz").write_bytes(pack(content))
    assert_holds(load("fashion_mnist", tmp_path), arrays)


@pytest.mark.parametrize("kind", ["images-idx3-ubyte", "labels-idx1-ubyte"])
@pytest.mark.parametrize("pack", PACKINGS.values(), ids=PACKINGS)
def test_training_and_test_files_swapped_are_to_be_renamed(tmp_path, registered, pack, kind):
    train, test = f"train-{kind}", f"t10k-{kind}"
    registered[train], registered[test] = registered[test], registered[train]
    for file, content in registered.items():
        (tmp_path / file).write_bytes(pack(content))
    with pytest.raises(DataError) as caught:
        load("fashion_mnist", tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / train}: by its checksum this is {test} of fashion_mnist, expected {train} of "
        "fashion_mnist: rename it"
    )


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_checksums_of_the_real_files(name, mnist_directory):
    directory = mnist_directory.with_name(name)
    if not directory.is_dir():
        pytest.skip(f"the real dataset is not at {directory}")
    zipped = {f"{file}.gz": (directory / f"{file}.gz").read_bytes() for file in FILES}
    unzipped = {file: gzip.decompress(zipped[f"{file}.gz"]) for file in FILES}
    assert SOURCES[name]["sha256"] == sha256(zipped | unzipped)


def test_real_mnist(mnist_directory):
    dataset = load("mnist", mnist_directory)
    assert [array.shape for array in dataset[1:]] == [
        (60000, 28, 28),
        (60000,),
        (10000, 28, 28),
        (10000,),
    ]
    assert dataset.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert dataset.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert dataset.train_images.mean() == pytest.approx(33.32, abs=0.005)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("mnits", "mnist"), ("fashion-mnist", "fashion_mnist"), ("digit", "digits")],
)
def test_unknown_name_is_answered_with_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"unknown dataset '{name}': did you mean '{nearest}'"):
        load(name)


def test_data_errors_are_value_errors():
    assert issubclass(DownloadError, DataError)
    assert issubclass(DataError, ValueError)


def test_digits_are_those_of_scikit_learn():
    dataset = load("digits")
    original = load_digits()
    images = np.concatenate([dataset.train_images, dataset.test_images])
    labels = np.concatenate([dataset.train_labels, dataset.test_labels])
    assert dataset.train_images.shape == (1437, 28, 28)
    assert dataset.test_images.shape == (360, 28, 28)
    assert (images.dtype, labels.dtype) == ("uint8", "int32")
    np.testing.assert_array_equal(labels, original.target)
    assert (images.min(), images.max()) == (0, 255)
    assert images.mean() == pytest.approx(original.images.mean() * 255 / 16, rel=0.05)
    assert set(dataset.train_labels) == set(dataset.test_labels) == set(range(10))


def test_each_digit_keeps_its_shape():
    small = load_digits().images[:1437].reshape(1437, 64)
    corners = np.linspace(0, 27, 8).round().astype(int)
    sampled = load("digits").train_images[:, corners][:, :, corners].reshape(1437, 64)
    for original, resized in zip(small, sampled, strict=True):
        assert np.corrcoef(original, resized)[0, 1] > 0.9


def test_digits_are_deterministic():
    assert fingerprint(load("digits")) == fingerprint(load("digits"))


def test_digits_need_no_directory(tmp_path):
    assert load("digits", tmp_path / "missing").name == "digits"


def test_fingerprint_is_that_of_the_arrays_whatever_the_files(tmp_path, files):
    places = [
        write(tmp_path / "plain", files),
        write(tmp_path / "gzipped", files, FILES),
        write(tmp_path / "torchvision" / "MNIST" / "raw", files, FILES[1:3]).parents[1],
    ]
    assert len({fingerprint(load("mnist", place)) for place in places}) == 1


@pytest.mark.parametrize("index", range(4), ids=FILES)
def test_fingerprint_changes_with_any_array(tmp_path, arrays, index):
    before = fingerprint(load("mnist", write(tmp_path, idx_files(arrays))))
    arrays[index][-1] ^= 1
    assert fingerprint(load("mnist", write(tmp_path, idx_files(arrays)))) != before


def test_fingerprint_changes_with_the_order(tmp_path, arrays):
    before = load("mnist", write(tmp_path, idx_files(arrays)))
    after = before._replace(
        train_images=before.train_images[::-1], train_labels=before.train_labels[::-1]
    )
    assert fingerprint(after) != fingerprint(before)


def png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "png")
    return stream.getvalue()


def prepare(data_dir: Path, arrays: tuple[np.ndarray, ...], version: str = "3.0.1") -> Path:
    """Has TFDS prepare a dataset of its form and name; returns its directory."""

    class Mnist(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self):
            image = tfds.features.Image(shape=(28, 28, 1))
            label = tfds.features.ClassLabel(num_classes=10)
            features = tfds.features.FeaturesDict({"image": image, "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples(*arrays[:2]),
                "test": self._generate_examples(*arrays[2:]),
            }

        def _generate_examples(self, images, labels):
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield index, {"image": png(image), "label": int(label)}

    tfds.disable_progress_bar()
    Mnist(data_dir=data_dir, file_format="array_record").download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    return data_dir / "mnist" / version


def no_network(*_):
    raise DownloadError("no network")


def make_tfrecord(prepared: Path) -> None:
    info = prepared / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))


@pytest.mark.parametrize("name", ["auto", "mnist"])
def test_prepared_dataset_is_found_in_the_directory_of_tfds(tmp_path, monkeypatch, arrays, name):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    prepare(tmp_path, arrays)
    dataset = load(name)
    assert dataset.name == "mnist"
    assert_holds(dataset, arrays)


def test_prepared_dataset_is_found_in_the_directory_named(tmp_path, arrays):
    prepare(tmp_path, arrays)
    assert_holds(load("mnist", tmp_path), arrays)


def test_prepared_dataset_of_another_name_is_not_taken(tmp_path, arrays):
    prepare(tmp_path, arrays)
    with pytest.raises(DataError, match="kmnist is not here"):
        load("kmnist", tmp_path)


def test_idx_files_go_before_a_prepared_dataset(tmp_path, arrays, files):
    prepare(tmp_path, noise(20, 10, seed=1))
    assert_holds(load("mnist", write(tmp_path, files)), arrays)


@pytest.mark.parametrize(
    ("versions", "highest"),
    [(("3.0.1", "3.0.10", "3.0.9"), 1), (("10.0.0", "3.0.10"), 0), (("2.9.9", "3.0.0"), 1)],
)
def test_highest_version_wins(tmp_path, versions, highest):
    candidates = [noise(20, 10, seed=seed) for seed in range(len(versions))]
    for version, candidate in zip(versions, candidates, strict=True):
        prepare(tmp_path, candidate, version)
    assert_holds(load("mnist", tmp_path), candidates[highest])


def test_tfrecord_is_refused_where_it_is_named_and_else_passed_over(tmp_path, monkeypatch, arrays):
    make_tfrecord(prepare(tmp_path, arrays))
    message = rf"{tmp_path}/mnist: the dataset that TFDS prepared here cannot be .*TFRECORD is not"
    with pytest.raises(DataError, match=message):
        load("mnist", tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(download, "fetch", no_network)
    with (
        pytest.warns(DataWarning, match=rf"{message}.*; it is passed over"),
        pytest.raises(DownloadError, match="mnist cannot be downloaded"),
    ):
        load("mnist")


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda shard: shard.write_bytes(b""),
        lambda shard: shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2]),
        lambda shard: shard.write_bytes(shard.read_bytes()[:-1]),
        lambda shard: shard.write_bytes(bytes(shard.stat().st_size)),
        lambda shard: shard.unlink(),
    ],
    ids=["empty", "half", "cut", "zeros", "missing"],
)
def test_damaged_shard_is_refused(tmp_path, arrays, split, damage):
    damage(prepare(tmp_path, arrays) / f"mnist-{split}.array_record-00000-of-00001")
    with pytest.raises(DataError, match="mnist: the dataset that TFDS prepared here cannot be"):
        load("mnist", tmp_path)


@pytest.mark.parametrize("name", ["auto", "mnist"])
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("dataset_info.json", ""),
        ("dataset_info.json", '{"name": "mnist", "spl'),
        ("dataset_info.json", '{"nonsense": 1}'),
        ("dataset_info.json", "{}"),
        ("features.json", ""),
        ("features.json", "{}"),
    ],
)
def test_damaged_description_is_refused(tmp_path, arrays, name, file, content):
    (prepare(tmp_path, arrays) / file).write_text(content)
    with pytest.raises(DataError, match="mnist: the dataset that TFDS prepared here cannot be"):
        load(name, tmp_path)


def test_damage_in_tfds_own_directory_is_passed_over(public_path, monkeypatch):
    monkeypatch.setattr(download, "fetch", no_network)
    monkeypatch.setenv("TFDS_DATA_DIR", str(public_path))
    with (
        locked(public_path),
        pytest.warns(DataWarning, match=f"{public_path}.*Permission.*passed over"),
        pytest.raises(DownloadError, match="mnist cannot be downloaded"),
    ):
        load("mnist")

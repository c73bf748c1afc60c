"""Files and settings from somebody else: they are read as documented or refused in one sentence."""

import contextlib
import dataclasses
import gzip
import io
import json
import pickle
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from command import blank_pictures
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bnjax import data
from bnjax.data.idx import read_images, read_labels
from bnjax.errors import DataError
from bnjax.models import MLP
from bnjax.parallel.mesh import AXES, parse_mesh
from bnjax.torch_interop import from_torch, to_torch
from experiments import mnist_bn, report
from experiments.lab import metrics, rundir
from experiments.lab.presets import PRESETS, Experiment, from_json

HUGE = 2**32 - 1
MARKUP = "a<script>alert('&\"')</script><img src=x onerror=y>{{ 7 * 7 }}b"


def examples(count: int):
    return settings(max_examples=count, derandomize=True, deadline=None, database=None)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory that all examples of a property write to, one after the other."""
    return tmp_path_factory.mktemp("place")


def assert_one_sentence(error: Exception, told: object = "") -> None:
    assert str(told) in str(error)
    assert len(str(error).splitlines()) == 1


@st.composite
def mutated(draw, originals: st.SearchStrategy[bytes]) -> bytes:
    """Some bytes cut out, put in or changed. Few are put in, so that no number becomes large."""
    content = draw(originals)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        stop = start + draw(st.sampled_from([0, 1, 2, 16, len(content)]))
        content = content[:start] + draw(st.binary(max_size=4)) + content[stop:]
    return content


def idx(*shape: int, values: bytes = b"", kind: int = 8) -> bytes:
    return bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + values


IMAGES = st.integers(0, 3).map(lambda n: idx(n, 28, 28, values=bytes(784 * n)))
LABELS = st.binary(max_size=9).map(lambda v: idx(len(v), values=bytes(b % 10 for b in v)))
LENGTHS = st.sampled_from([0, 1, 28, 255, 2**16, 2**31, HUGE])
CLAIMS = st.builds(
    lambda shape, values, kind: idx(*shape, values=values, kind=kind),
    st.lists(LENGTHS, max_size=4),
    st.binary(max_size=20),
    st.sampled_from([8, 8, 8, 9, 13, 14]),
)
PLAIN = st.one_of(st.binary(), IMAGES, LABELS, CLAIMS, mutated(IMAGES), mutated(LABELS))
ZIPPED = PLAIN.map(lambda content: gzip.compress(content, 1))
IDX_FILES = st.one_of(
    st.tuples(st.just(""), PLAIN),
    st.tuples(st.just(".gz"), st.one_of(PLAIN, ZIPPED, mutated(ZIPPED))),
)


def assert_images(images: np.ndarray) -> None:
    assert images.dtype == np.uint8
    assert images.shape[1:] == (28, 28)


def assert_labels(labels: np.ndarray) -> None:
    assert labels.dtype == np.int32
    assert labels.ndim == 1
    assert ((labels >= 0) & (labels <= 9)).all()


def peak_memory(function: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def zeros(megabytes: int, header: bytes = b"") -> bytes:
    """A gzip stream of that many zeros, made without holding them."""
    press = zlib.compressobj(9, wbits=31)
    parts = [press.compress(header), *(press.compress(bytes(2**20)) for _ in range(megabytes))]
    return b"".join(parts) + press.flush()


class TestIdx:
    @examples(300)
    @given(IDX_FILES)
    def test_are_read_as_documented_or_refused(self, place, file):
        suffix, content = file
        path = place / f"idx{suffix}"
        path.write_bytes(content)
        for read, check in ((read_images, assert_images), (read_labels, assert_labels)):
            try:
                check(read(path))
            except DataError as error:
                assert_one_sentence(error, path)

    @pytest.mark.parametrize("shape", [(HUGE, 28, 28), (HUGE, HUGE, HUGE), (2**31, 28, 28)])
    @pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzipped"])
    def test_absurd_sizes_take_no_memory(self, tmp_path, shape, pack):
        path = tmp_path / ("idx" if pack is bytes else "idx.gz")
        path.write_bytes(pack(idx(*shape, values=bytes(1000))))

        def read() -> None:
            with pytest.raises(DataError, match=r"truncated, the header announces .*, found 1000"):
                read_images(path)

        assert peak_memory(read) < 2**20

    def test_what_follows_the_announced_values_is_not_unpacked(self, tmp_path):
        path = tmp_path / "bomb.gz"
        path.write_bytes(zeros(100, idx(2, 28, 28)))

        def read() -> None:
            with pytest.raises(DataError, match="oversized"):
                read_images(path)

        assert peak_memory(read) < 2**20

    def test_what_is_announced_but_missing_takes_no_memory(self, tmp_path):
        noise = np.random.default_rng(0).bytes(2**18)
        path = tmp_path / "idx.gz"
        path.write_bytes(gzip.compress(idx(200_000, 28, 28, values=noise)))

        def read() -> None:
            with pytest.raises(DataError, match="truncated"):
                read_images(path)

        assert peak_memory(read) < 8 * 2**20

    @examples(80)
    @given(st.lists(IDX_FILES, min_size=4, max_size=4), st.sampled_from(list(data.SOURCES)))
    def test_a_directory_of_them(self, tmp_path_factory, files, name):
        directory = tmp_path_factory.mktemp("idx")
        for file, (suffix, content) in zip(data.FILES, files, strict=True):
            (directory / f"{file}{suffix}").write_bytes(content)
        try:
            dataset = data.load(name, directory)
        except DataError as error:
            assert_one_sentence(error, directory)
        else:
            for images, labels in (dataset[1:3], dataset[3:5]):
                assert_images(images)
                assert_labels(labels)
                assert len(images) == len(labels) > 0

    @pytest.mark.parametrize("obstacle", ["directory", "loop"])
    def test_a_directory_with_something_else_in_their_place(self, tmp_path, obstacle):
        for file in data.FILES:
            (tmp_path / file).write_bytes(idx(1, 28, 28, values=bytes(784)))
        path = tmp_path / data.FILES[0]
        path.unlink()
        path.mkdir() if obstacle == "directory" else path.symlink_to(path)
        with pytest.raises(DataError) as caught:
            data.load("mnist", tmp_path)
        assert_one_sentence(caught.value, tmp_path)


NUMBERS = st.one_of(st.integers(-3, 70), st.just(10**400), st.floats(), st.booleans())
TEXTS = st.one_of(st.text(max_size=8), st.sampled_from(["relu", "deep10", "normal(1e999)", "auto"]))
JSON = st.recursive(
    st.one_of(st.none(), NUMBERS, TEXTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = [field.name for field in dataclasses.fields(Experiment)]


def saved(experiment: Experiment) -> dict:
    """As `config.json` gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(experiment)))


@st.composite
def mutated_experiments(draw) -> dict:
    values = saved(PRESETS[draw(st.sampled_from(list(PRESETS)))])
    values |= draw(st.dictionaries(st.sampled_from(NAMES), JSON, min_size=1, max_size=2))
    damage = draw(st.sampled_from(["", "", "", "missing", "surplus"]))
    if damage == "missing":
        del values[draw(st.sampled_from(NAMES))]
    elif damage == "surplus":
        values[draw(st.text(max_size=4))] = 1
    return values


class TestExperiment:
    @examples(400)
    @given(st.one_of(mutated_experiments(), st.dictionaries(st.text(), JSON)))
    def test_is_loaded_as_it_was_saved_or_refused(self, values):
        try:
            experiment = from_json(Experiment, values)
        except (ValueError, TypeError) as error:
            assert_one_sentence(error)
        else:
            assert saved(experiment) == values
            for field in dataclasses.fields(experiment):
                value = getattr(experiment, field.name)
                expected = type(field.default)
                kinds = (str, type(None)) if field.default is None else (expected,)
                assert type(value) in kinds or (expected is float and type(value) is int)
            assert all(type(size) is int for size in experiment.hidden_sizes)

    @examples(100)
    @given(
        st.sampled_from(list(PRESETS.values())),
        st.fixed_dictionaries(
            {
                "epochs": st.integers(1, 10**6),
                "batch_size": st.integers(2, 10**6),
                "learning_rate": st.floats(min_value=1e-30, max_value=1e30),
                "hidden_sizes": st.lists(st.integers(1, 10**4), min_size=1).map(tuple),
                "seed": st.integers(0, 2**32 - 1),
                "drop_last": st.booleans(),
                "bn_init": st.sampled_from(["he_normal", "normal(0.05)"]),
            }
        ),
    )
    def test_makes_the_round_trip(self, preset, values):
        experiment = dataclasses.replace(preset, **values)
        assert from_json(Experiment, saved(experiment)) == experiment


CONFIG = {
    "experiment": saved(Experiment()),
    "execution": {},
    "dataset": {"name": "digits", "requested": "auto", "sha256": "0" * 64},
}
DEEP = b"[" * 100_000


class TestConfiguration:
    @examples(300)
    @given(
        st.one_of(
            st.binary(),
            JSON.map(lambda value: json.dumps(value).encode()),
            mutated(st.just(json.dumps(CONFIG).encode())),
        )
    )
    @example(json.dumps(CONFIG).encode())
    @example(DEEP)
    @example(b"9" * 5000)
    @example(b'\xef\xbb\xbf{"experiment": {}}')
    def test_is_read_or_refused(self, place, content):
        (place / "config.json").write_bytes(content)
        try:
            config = rundir.read_config(place)
        except ValueError as error:
            assert_one_sentence(error, place / "config.json")
        else:
            assert all(isinstance(config[section], dict) for section in rundir.SECTIONS)

    @examples(200)
    @given(st.one_of(st.text(), st.from_regex(r"(replicate|data|x)=[0-9²٣]{1,3}(,data=1)?")))
    @example("replicate=" + "9" * 5000)
    @example("replicate=²")
    def test_mesh(self, text):
        try:
            sizes = parse_mesh(text)
        except ValueError as error:
            assert_one_sentence(error)
        else:
            assert tuple(sizes) == AXES
            assert all(type(size) is int and size >= 1 for size in sizes.values())


def line(epoch: int, arm: str, **changes) -> bytes:
    place = {"epoch": epoch, "arm": arm, "replicate": 0}
    values = {**place, **dict.fromkeys(metrics.METRICS, 0.5), "seconds": 0.1, **changes}
    return json.dumps(values).encode() + b"\n"


ARMS = ("bn", "no_bn")
METRICS = b"".join(line(epoch, arm) for epoch in (1, 2) for arm in ARMS)
METRIC_FILES = st.one_of(
    st.binary(),
    st.lists(JSON, max_size=3).map(lambda x: b"".join(json.dumps(y).encode() + b"\n" for y in x)),
    mutated(st.just(METRICS)),
    st.dictionaries(st.sampled_from(["epoch", "arm", "replicate", "test_loss"]), JSON).map(
        lambda changes: METRICS + line(**{"epoch": 2, "arm": "bn", **changes})
    ),
)
ABSURD = {
    "epoch": line(10**13, "bn"),
    "replicate": line(1, "bn", replicate=10**13),
    "epoch -1": line(-1, "bn"),
    "epoch 0": line(0, "bn"),
    "replicate -1": line(1, "bn", replicate=-1),
    "text": line(1, "bn", test_loss="low"),
    "large number": line(1, "bn", test_loss=10**400),
    "arm": line(1, "relu"),
    "incomplete": b'{"epoch": 1}\n',
    "deep": DEEP + b"\n",
}


class TestMetrics:
    @examples(200)
    @given(METRIC_FILES)
    @example(METRICS)
    @example(DEEP + b"\n")
    def test_are_read_or_refused(self, place, content):
        (place / "metrics.jsonl").write_bytes(content)
        try:
            lines = metrics.read(place, ARMS, 1)
        except ValueError as error:
            assert_one_sentence(error, place / "metrics.jsonl")
        else:
            assert all(isinstance(one, dict) for one in lines)

    @examples(200)
    @given(METRIC_FILES)
    @example(METRICS)
    def test_become_curves_or_are_refused(self, place, content):
        (place / "metrics.jsonl").write_bytes(content)
        try:
            curves = metrics.curves(metrics.read(place, ARMS, 1), ARMS)
        except ValueError as error:
            assert_one_sentence(error)
        else:
            assert tuple(curves) == ARMS
            shapes = {values.shape for arm in curves.values() for values in arm.values()}
            assert len(shapes) == 1

    @pytest.mark.parametrize("added", ABSURD.values(), ids=ABSURD)
    def test_of_absurd_values_are_refused(self, tmp_path, added):
        (tmp_path / "metrics.jsonl").write_bytes(METRICS + added)
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            metrics.curves(metrics.read(tmp_path, ARMS, 1), ARMS)
        assert_one_sentence(caught.value)


class Malicious:
    """Notices when it is pickled or copied, and would end the program when unpickled."""

    called = False

    def __reduce__(self):
        Malicious.called = True
        return exec, ("raise SystemExit('unpickled')",)


MODEL = MLP(hidden_sizes=(3,), num_classes=2)
STATE = {
    "0.weight": np.ones((3, 4)),
    "0.bias": np.ones(3),
    "1.weight": np.ones(3),
    "1.bias": np.ones(3),
    "1.running_mean": np.ones(3),
    "1.running_var": np.ones(3),
    "1.num_batches_tracked": np.array(1),
    "3.weight": np.ones((2, 3)),
    "3.bias": np.ones(2),
}
VALUES = st.one_of(
    JSON,
    st.binary(max_size=4),
    st.builds(Malicious),
    st.builds(Malicious).map(lambda one: [one]),
    st.builds(Malicious).map(lambda one: np.full((3, 4), one, object)),
    st.just(pickle.dumps(print)),
    st.builds(object),
    st.just(np.zeros(3, [("a", "f4")])),
    st.just(np.array(["1", "2", "3"])),
    st.just(np.array(5, "datetime64[s]")),
)


class TestFromTorch:
    @examples(200)
    @given(st.dictionaries(st.sampled_from(list(STATE)), VALUES, min_size=1, max_size=2))
    @example({"1.num_batches_tracked": Malicious()})
    @example({"0.weight": np.full((3, 4), Malicious(), object)})
    @example({"1.num_batches_tracked": b"\x80\x04."})
    def test_takes_numbers_and_never_unpickles(self, changes):
        Malicious.called = False
        try:
            variables = from_torch({**STATE, **changes}, MODEL)
        except ValueError:
            pass
        else:
            for value in to_torch(variables).values():
                assert value.dtype.kind in "biuf"
        assert not Malicious.called

    @examples(50)
    @given(st.dictionaries(st.one_of(st.text(), st.integers(), st.binary()), VALUES, max_size=4))
    def test_of_anything_else_is_refused(self, state):
        with pytest.raises((TypeError, ValueError)):
            from_torch(state, MODEL)

    @pytest.mark.parametrize(
        "given",
        [
            pickle.dumps(STATE),
            "weights.pt",
            Path("weights.pt"),
            io.BytesIO(),
            None,
            [1],
            STATE.keys(),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_of_no_mapping_is_refused(self, given):
        with pytest.raises((TypeError, ValueError)):
            from_torch(given, MODEL)


class Page(HTMLParser):
    """The tags of a page, their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, text):
        self.text += text


def with_markup(value):
    """The same structure, with markup behind every text."""
    if isinstance(value, dict):
        return {name: with_markup(item) for name, item in value.items()}
    if isinstance(value, list):
        return [with_markup(item) for item in value]
    return value + MARKUP if isinstance(value, str) else value


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    arguments = (
        "--dataset digits --preset deep10 --hidden-sizes 5 --batch-size 100 --drop-last "
        "--epochs 1 --no-cache --no-progress --out a<script>b"
    )
    with contextlib.chdir(home), contextlib.redirect_stdout(io.StringIO()), blank_pictures():
        assert mnist_bn.main(arguments.split()) == 0
    return home / "a<script>b"


@pytest.mark.slow
class TestReport:
    def test_of_a_path_with_markup(self, run):
        page = (run / "report.html").read_text()
        assert "a<script>b" not in page
        assert "script" not in Page(page).tags

    def test_of_names_and_settings_with_markup(self, run):
        config = rundir.read_config(run)
        experiment = config["experiment"]
        hostile = {**with_markup(config), "experiment": experiment}
        hostile["execution"]["data_dir"] = MARKUP
        rundir.write_json(run / "config.json", hostile)
        plain = Page((run / "report.html").read_text())
        with blank_pictures():
            report.redraw(run)
        page = Page((run / "report.html").read_text())
        assert page.text.count(MARKUP) >= 4
        assert page.tags == plain.tags
        assert page.attributes == plain.attributes

"""Downloading from an HTTP server on this machine, which behaves well or badly."""

import contextlib
import dataclasses
import gzip
import hashlib
import http.server
import os
import pwd
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from factories import idx

from bnjax.data import FILES, SOURCES, Dataset, DataWarning, cache_directory, download, load
from bnjax.errors import DownloadError
from experiments import mnist_bn, reproduce, sweep
from experiments.lab import devices, loop

ZIPPED = [f"{file}.gz" for file in FILES]
NOBODY = 65534


class Request(http.server.BaseHTTPRequestHandler):
    server: "Server"

    def do_GET(self):
        file = self.path.removeprefix("/")
        self.server.requested.append(file)
        self.server.behaviour.get(file, whole)(self, self.server.files[file])

    def announce(self, size: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`, each as its `behaviour` says, and notes what was `requested`."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Request)
        self.files = files
        self.behaviour: dict[str, Callable[[Request, bytes], None]] = {}
        self.requested: list[str] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request, client_address):
        """A client that hangs up is no error of the server."""


@contextlib.contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Server]:
    with Server(files) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()


def whole(request: Request, content: bytes) -> None:
    request.announce(len(content))
    request.wfile.write(content)


def other_bytes(request: Request, content: bytes) -> None:
    whole(request, bytes(len(content)))


def broken_off(request: Request, content: bytes) -> None:
    request.announce(len(content))
    request.wfile.write(content[: len(content) // 2])


def ended_early(request: Request, content: bytes) -> None:
    whole(request, content[: len(content) // 2])


def not_found(request: Request, content: bytes) -> None:
    request.send_error(404)


def server_error(request: Request, content: bytes) -> None:
    request.send_error(500)


def silent(request: Request, content: bytes) -> None:
    request.server.closing.wait(60)


def stalled(request: Request, content: bytes) -> None:
    request.announce(len(content))
    request.wfile.write(content[: len(content) // 2])
    request.server.closing.wait(60)


def dribbled(request: Request, content: bytes, pieces: int = 8) -> None:
    request.announce(len(content))
    for piece in np.array_split(np.frombuffer(content, np.uint8), pieces):
        request.wfile.write(piece.tobytes())
        time.sleep(0.5)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return tuple(
        array
        for count in (30, 15)
        for array in (
            rng.integers(0, 256, (count, 28, 28), np.uint8),
            rng.integers(0, 10, count, np.uint8),
        )
    )


@pytest.fixture
def server(arrays, monkeypatch):
    """A small dataset, registered as MNIST."""
    zipped = [gzip.compress(idx(array), mtime=0) for array in arrays]
    with serving(dict(zip(ZIPPED, zipped, strict=True))) as server:
        source = dataclasses.replace(
            SOURCES["mnist"],
            url=server.url,
            sizes=tuple(len(content) for content in zipped),
            sha256=tuple(hashlib.sha256(content).hexdigest() for content in zipped),
        )
        monkeypatch.setitem(SOURCES, "mnist", source)
        yield server


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def nobody_listens(monkeypatch):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/"
        monkeypatch.setitem(SOURCES, "mnist", dataclasses.replace(SOURCES["mnist"], url=url))
        yield


def place() -> Path:
    return cache_directory() / "datasets" / "mnist"


def kept() -> list[str]:
    return sorted(str(path.relative_to(place())) for path in place().rglob("*"))


def fill_cache(files: dict[str, bytes]) -> None:
    place().mkdir(parents=True)
    for file, content in files.items():
        (place() / file).write_bytes(content)


def assert_holds(dataset: Dataset, arrays: tuple[np.ndarray, ...]) -> None:
    assert dataset.name == "mnist"
    for found, expected in zip(dataset[1:], arrays, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["auto", "mnist"])
def test_true_files_load_and_are_kept(server, arrays, name):
    assert_holds(load(name), arrays)
    assert server.requested == ZIPPED
    assert kept() == sorted(ZIPPED)


def test_second_load_makes_no_request(server, arrays):
    load("mnist")
    server.requested.clear()
    assert_holds(load("mnist"), arrays)
    assert server.requested == []


def test_real_mnist_is_recognized(mnist_directory, monkeypatch):
    with serving({file: (mnist_directory / file).read_bytes() for file in ZIPPED}) as server:
        source = dataclasses.replace(SOURCES["mnist"], url=server.url)
        monkeypatch.setitem(SOURCES, "mnist", source)
        dataset = load("mnist")
    assert dataset.train_images.shape == (60000, 28, 28)
    assert dataset.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert kept() == sorted(ZIPPED)


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (not_found, "answers with HTTP status 404"),
        (server_error, "answers with server errors"),
        (broken_off, "broke the connection off in the middle of a file"),
        (ended_early, "serves other bytes than the registered checksum says"),
        (other_bytes, "serves other bytes than the registered checksum says"),
    ],
)
def test_failure_leaves_only_whole_files(server, behaviour, message):
    server.behaviour[ZIPPED[1]] = behaviour
    with pytest.raises(DownloadError, match=f"mnist cannot be downloaded: 127.0.0.1:.* {message}"):
        load("mnist")
    assert kept() == [ZIPPED[0]]


@pytest.mark.parametrize("failing", [0, 3])
def test_only_missing_files_are_requested_again(server, arrays, failing):
    server.behaviour[ZIPPED[failing]] = not_found
    with pytest.raises(DownloadError, match="404"):
        load("mnist")
    assert kept() == sorted(ZIPPED[:failing])
    server.behaviour.clear()
    server.requested.clear()
    assert_holds(load("mnist"), arrays)
    assert server.requested == ZIPPED[failing:]


@pytest.mark.parametrize(
    "damage",
    [lambda content: b"", lambda content: content[:-1], lambda content: bytes(len(content))],
    ids=["empty", "cut", "zeros"],
)
def test_damaged_file_in_the_cache_is_fetched_again(server, arrays, damage):
    fill_cache(server.files | {ZIPPED[1]: damage(server.files[ZIPPED[1]])})
    assert_holds(load("mnist"), arrays)
    assert server.requested == [ZIPPED[1]]


def test_damaged_file_in_the_cache_is_not_taken_for_whole(server):
    fill_cache(server.files | {ZIPPED[2]: server.files[ZIPPED[2]][:-1]})
    server.behaviour[ZIPPED[2]] = not_found
    with pytest.raises(DownloadError, match="404"):
        load("mnist")


def test_slow_server_is_borne(server, arrays, monkeypatch):
    monkeypatch.setattr(download, "GIVE_UP_AFTER", 3.0)
    server.behaviour[ZIPPED[0]] = dribbled
    start = time.monotonic()
    assert_holds(load("mnist"), arrays)
    assert time.monotonic() - start > download.GIVE_UP_AFTER


@pytest.mark.parametrize("behaviour", [silent, stalled])
def test_stalled_server_is_given_up(server, monkeypatch, behaviour):
    monkeypatch.setattr(download, "GIVE_UP_AFTER", 2.5)
    server.behaviour[ZIPPED[1]] = behaviour
    start = time.monotonic()
    with pytest.raises(DownloadError, match=r"no byte came from 127.0.0.1:\d+ for 2.5 seconds"):
        load("mnist")
    assert 2.5 < time.monotonic() - start < 15
    assert server.requested == ZIPPED[:2]
    assert kept() == [ZIPPED[0]]


@pytest.mark.usefixtures("nobody_listens")
def test_absent_server_is_noticed_at_once():
    start = time.monotonic()
    with pytest.raises(DownloadError, match=r"127.0.0.1:\d+ cannot be reached; .*--data-dir"):
        load("mnist")
    assert time.monotonic() - start < download.GIVE_UP_AFTER
    assert kept() == []


@pytest.mark.usefixtures("nobody_listens")
def test_auto_falls_back_to_digits_with_a_warning():
    with pytest.warns(DataWarning, match=r"cannot be reached.*digits .* not comparable"):
        dataset = load("auto")
    assert dataset.name == "digits"


def test_download_process_that_dies_is_reported(server, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(DownloadError, match="the download ended with status 1"):
        load("mnist")
    assert kept() == []


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("mode", [0o555, 0])
def test_cache_without_permission_is_named(server, monkeypatch, mode):
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        cache = Path(directory, "cache")
        cache.mkdir(mode)
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        monkeypatch.setenv("TFDS_DATA_DIR", directory)
        with unprivileged(), pytest.raises(DownloadError, match=f"cannot be downl.*{cache}"):
            load("mnist")
    assert server.requested == []


def test_file_in_place_of_the_cache_is_named(server, monkeypatch, tmp_path):
    (tmp_path / "cache").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DownloadError, match=f"cannot be downloaded: .*{tmp_path}/cache"):
        load("mnist")
    with pytest.warns(DataWarning, match=f"{tmp_path}/cache.*digits"):
        assert load("auto").name == "digits"
    assert server.requested == []


@pytest.fixture
def no_home(monkeypatch):
    """As in a container whose user has neither `$HOME` nor an entry in passwd."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(RuntimeError):
        Path.home()


@pytest.mark.usefixtures("no_home")
def test_without_a_home_there_is_no_place_for_a_download(server):
    message = (
        r"mnist cannot be downloaded: there is no home directory to keep it in and "
        r"\$XDG_CACHE_HOME is not set; put its four IDX files .*--data-dir"
    )
    with pytest.raises(DownloadError, match=message):
        load("mnist")
    with pytest.warns(DataWarning, match=message) as warned:
        assert load("auto").name == "digits"
    assert len(warned) == 1
    assert server.requested == []
    assert cache_directory() is None


@pytest.mark.usefixtures("no_home")
def test_without_a_home_a_cache_that_is_named_does(server, arrays, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert_holds(load("mnist"), arrays)
    assert cache_directory() == tmp_path / "bnjax"


@pytest.mark.usefixtures("no_home")
@pytest.mark.parametrize(
    ("main", "module", "work", "arguments"),
    [
        (mnist_bn.main, loop, "run", []),
        (sweep.main, sweep, "_train_once", []),
        (reproduce.main, reproduce, "run", ["all"]),
    ],
    ids=["mnist_bn", "sweep", "reproduce"],
)
def test_without_a_home_a_command_starts_and_keeps_no_programs(
    monkeypatch, tmp_path, main, module, work, arguments
):
    class StartedError(Exception):
        pass

    def start(*_):
        raise StartedError

    monkeypatch.setattr(module, work, start)
    monkeypatch.setattr(
        devices, "enable_compilation_cache", lambda directory: pytest.fail(f"{directory}")
    )
    with pytest.raises(StartedError):
        main([*arguments, "--dataset", "digits", "--out", str(tmp_path / "out")])


def test_download_errors_are_value_errors():
    assert issubclass(DownloadError, ValueError)

"""Downloading from an HTTP server on this machine, which behaves well or badly."""

import contextlib
import gzip
import hashlib
import http.server
import pwd
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from factories import idx, locked, noise

from bnjax.data import FILES, SOURCES, Dataset, DataWarning, cache_directory, download, load
from bnjax.errors import DownloadError
from experiments import mnist_bn, reproduce, sweep
from experiments.lab import devices, loop

ZIPPED = [f"{file}.gz" for file in FILES]


class Request(http.server.BaseHTTPRequestHandler):
    server: "Server"

    def do_GET(self):
        file = self.path.removeprefix("/")
        self.server.requested.append(file)
        self.server.behaviour.get(file, Request.send)(self, self.server.files[file])

    def send(self, content: bytes, announced: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(announced or len(content)))
        self.end_headers()
        self.wfile.write(content)

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


def broken_off(request: Request, content: bytes) -> None:
    request.send(content[: len(content) // 2], announced=len(content))


def stalled(request: Request, content: bytes) -> None:
    broken_off(request, content)
    request.server.closing.wait(60)


def silent(request: Request, content: bytes) -> None:
    request.server.closing.wait(60)


def not_found(request: Request, content: bytes) -> None:
    request.send_error(404)


def dribbled(request: Request, content: bytes) -> None:
    first, *pieces = np.array_split(np.frombuffer(content, np.uint8), 8)
    request.send(first.tobytes(), announced=len(content))
    for piece in pieces:
        time.sleep(0.2)
        request.wfile.write(piece.tobytes())


@pytest.fixture
def arrays():
    return noise(30, 15)


def register(monkeypatch, **changes) -> None:
    monkeypatch.setitem(SOURCES, "mnist", {**SOURCES["mnist"], **changes})


@pytest.fixture
def server(arrays, monkeypatch):
    """A small dataset, registered as MNIST."""
    zipped = [gzip.compress(idx(array), mtime=0) for array in arrays]
    with serving(dict(zip(ZIPPED, zipped, strict=True))) as server:
        sha256 = {
            file: hashlib.sha256(content).hexdigest() for file, content in server.files.items()
        }
        register(monkeypatch, url=server.url, sha256=sha256)
        yield server


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(autouse=True)
def asked_again_at_once(monkeypatch):
    monkeypatch.setattr("pooch.core.time", SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture
def nobody_listens(monkeypatch):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        register(monkeypatch, url=f"http://127.0.0.1:{bound.getsockname()[1]}/")
        yield


def place() -> Path:
    return cache_directory() / "datasets" / "mnist"


def kept() -> list[str]:
    return sorted(str(path.relative_to(place())) for path in place().rglob("*"))


def assert_holds(dataset: Dataset, arrays: tuple[np.ndarray, ...]) -> None:
    assert dataset.name == "mnist"
    for found, expected in zip(dataset[1:], arrays, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["auto", "mnist"])
def test_true_files_load_and_are_kept(server, arrays, name):
    assert_holds(load(name), arrays)
    assert server.requested == ZIPPED
    assert kept() == sorted(ZIPPED)
    assert_holds(load(name), arrays)
    assert server.requested == ZIPPED


def test_downloading_says_nothing_where_nobody_looks(server, capfd):
    load("mnist")
    assert capfd.readouterr() == ("", "")


def test_files_have_the_permissions_of_any_other(server, tmp_path):
    load("mnist")
    (tmp_path / "other").touch()
    modes = {path.stat().st_mode for path in [tmp_path / "other", *place().iterdir()]}
    assert len(modes) == 1


def test_real_mnist_is_recognized(mnist_directory, monkeypatch):
    with serving({file: (mnist_directory / file).read_bytes() for file in ZIPPED}) as server:
        register(monkeypatch, url=server.url)
        dataset = load("mnist")
    assert dataset.train_images.shape == (60000, 28, 28)
    assert dataset.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert kept() == sorted(ZIPPED)


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (not_found, r"does not come \(404 Client Error"),
        (lambda request, _: request.send_error(500), r"does not come \(500 Server Error"),
        (broken_off, r"does not come \(.*bytes read, .* more expected"),
        (
            lambda request, content: request.send(content[:-1]),
            "has other bytes than the regis",
        ),
        (lambda request, content: request.send(bytes(len(content))), "has other bytes than the"),
    ],
)
def test_failure_leaves_only_whole_files(server, behaviour, message):
    server.behaviour[ZIPPED[1]] = behaviour
    url = f"{server.url}{ZIPPED[1]}"
    with pytest.raises(DownloadError, match=f"mnist cannot be downloaded: {url} {message}.*--data"):
        load("mnist")
    assert kept() == [ZIPPED[0]]
    assert server.requested == [ZIPPED[0], *[ZIPPED[1]] * 2]


@pytest.mark.parametrize(
    "behaviour", [broken_off, lambda request, content: request.send_error(503)]
)
def test_what_fails_once_is_asked_for_again(server, arrays, behaviour):
    def fail_once(request: Request, content: bytes) -> None:
        server.behaviour.clear()
        behaviour(request, content)

    server.behaviour[ZIPPED[1]] = fail_once
    assert_holds(load("mnist"), arrays)
    assert server.requested == [*ZIPPED[:2], *ZIPPED[1:]]


def fail_at(server: Server, file: str) -> None:
    server.behaviour[file] = not_found
    with pytest.raises(DownloadError, match="404"):
        load("mnist")
    server.behaviour.clear()
    server.requested.clear()


@pytest.mark.parametrize("failing", [0, 3])
def test_only_missing_files_are_requested_again(server, arrays, failing):
    fail_at(server, ZIPPED[failing])
    assert kept() == sorted(ZIPPED[:failing])
    assert_holds(load("mnist"), arrays)
    assert server.requested == ZIPPED[failing:]


@pytest.mark.parametrize(
    "damage",
    [lambda content: b"", lambda content: content[:-1], lambda content: bytes(len(content))],
    ids=["empty", "cut", "zeros"],
)
def test_damaged_file_in_the_cache_is_fetched_again(server, arrays, damage):
    place().mkdir(parents=True)
    for file, content in (server.files | {ZIPPED[1]: damage(server.files[ZIPPED[1]])}).items():
        (place() / file).write_bytes(content)
    fail_at(server, ZIPPED[1])
    assert_holds(load("mnist"), arrays)
    assert server.requested == [ZIPPED[1]]


def test_slow_server_is_borne(server, arrays, monkeypatch):
    monkeypatch.setattr(download, "GIVE_UP_AFTER", 1.0)
    server.behaviour[ZIPPED[0]] = dribbled
    start = time.monotonic()
    assert_holds(load("mnist"), arrays)
    assert time.monotonic() - start > download.GIVE_UP_AFTER


@pytest.mark.parametrize(("behaviour", "times"), [(silent, 1), (stalled, 2)])
def test_stalled_server_is_given_up(server, monkeypatch, behaviour, times):
    monkeypatch.setattr(download, "GIVE_UP_AFTER", 1.5)
    server.behaviour[ZIPPED[1]] = behaviour
    start = time.monotonic()
    with pytest.raises(DownloadError, match=rf"{ZIPPED[1]} sends no byte for 1.5 seconds"):
        load("mnist")
    assert 1.5 <= time.monotonic() - start < 15
    assert server.requested == [ZIPPED[0], *[ZIPPED[1]] * times]
    assert kept() == [ZIPPED[0]]


@pytest.mark.usefixtures("nobody_listens")
def test_absent_server_is_noticed_at_once():
    start = time.monotonic()
    with pytest.raises(DownloadError, match=r"http://127.*gz cannot be reached; .*--data-dir"):
        load("mnist")
    assert time.monotonic() - start < download.GIVE_UP_AFTER
    assert kept() == []
    with pytest.warns(DataWarning, match=r"cannot be reached.*digits .* not comparable"):
        assert load("auto").name == "digits"


def test_looking_up_a_host_is_bounded_too(server, monkeypatch):
    register(monkeypatch, url="http://host.invalid/")
    monkeypatch.setattr(download, "GIVE_UP_AFTER", 0.5)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: server.closing.wait(60))
    with pytest.raises(DownloadError, match=r"http://host.invalid/.* sends no byte for 0.5 sec"):
        load("mnist")
    assert kept() == []


def test_server_without_a_certificate_is_refused(server, monkeypatch):
    register(monkeypatch, url=server.url.replace("http:", "https:"))
    with pytest.raises(DownloadError, match=r"https://127.* has no certificate that this"):
        load("mnist")


def test_file_that_cannot_be_written_is_an_error(server):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DownloadError, match=r"cannot be kept \(.*File too large"):
            load("mnist")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert kept() == []


def test_interrupt_is_obeyed_at_once(server, python_sigint):
    def interrupt(request: Request, content: bytes) -> None:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        stalled(request, content)

    server.behaviour[ZIPPED[1]] = interrupt
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        load("mnist")
    assert time.monotonic() - start < 3
    assert kept() == [ZIPPED[0]]


@pytest.mark.parametrize("mode", [0o555, 0])
def test_cache_without_permission_is_named(server, monkeypatch, public_path, mode):
    cache = public_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("TFDS_DATA_DIR", str(public_path))
    with locked(cache, mode), pytest.raises(DownloadError, match=f"cannot be downl.*{cache}"):
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
        (reproduce.main, reproduce, "measure", ["all"]),
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

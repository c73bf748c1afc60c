"""Whatever happens to a run, it goes on and ends with the numbers of one that nothing happened to.

Real runs are killed at six random moments. The full count is

    BNJAX_KILLS=30 python -m pytest -m slow tests/test_crash_recovery.py
"""

import contextlib
import errno
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import command
import numpy as np
import pytest
import safetensors.numpy
from command import Result, lines_of
from jax.experimental.compilation_cache import compilation_cache

from bnjax import checkpoint
from experiments import report
from experiments.lab import devices, metrics, rundir

call = partial(command.call, pictures=True)

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("BNJAX_KILLS", "6"))
EPOCHS = 4
NETWORK = "--dataset", "digits", "--preset", "deep10", "--hidden-sizes", 5
SETTINGS = *NETWORK, "--batch-size", 100, "--drop-last", "--no-progress"
FULL = Path("/dev/full")


class Reference(NamedTuple):
    """The run that nothing happened to, and how long it took from its first file to its end."""

    path: Path
    seconds: float


def new(path: Path, epochs: int = EPOCHS) -> tuple:
    return *SETTINGS, "--epochs", epochs, "--out", path


def files_of(path: Path) -> set[str]:
    """All files but the checkpoints, of which some are set aside, and `.lock`, which a process that
    is killed at its very end leaves, and which locks nothing then."""
    files = {file.relative_to(path) for file in path.rglob("*") if file.is_file()}
    return {str(file) for file in files if file.parts[0] not in ("checkpoints", ".lock")}


def saved(path: Path, epochs: int) -> Path:
    return checkpoint.file_of(path / "checkpoints", epochs)


def assert_equal_runs(path: Path, reference: Path) -> None:
    assert lines_of(path) == lines_of(reference)
    assert files_of(path) == files_of(reference)
    for name in ("summary.json", "curves.svg", "features.png"):
        assert (path / name).read_bytes() == (reference / name).read_bytes()
    assert (path / "report.html").read_text().endswith("</html>")
    assert not saved(path, EPOCHS + 1).exists()
    mine, others = (checkpoint.load(saved(run, EPOCHS))[0] for run in (path, reference))
    assert {name: (array.dtype, array.tobytes()) for name, array in mine.items()} == {
        name: (array.dtype, array.tobytes()) for name, array in others.items()
    }


def assert_told(result: Result, path: Path, file: str, reason: str) -> None:
    """One sentence, which names the file, and how to go on where that is possible."""
    assert result.status == 2
    assert len(result.err.splitlines()) == 1
    assert result.err.startswith("error: ")
    assert f"{path / file}" in result.err
    assert reason in result.err
    assert "Traceback" not in result.out + result.err
    goes_on = (path / "config.json").exists()
    assert result.err.rstrip().endswith(shlex.join(["--resume", str(path)])) == goes_on


@pytest.fixture(scope="module", autouse=True)
def cache_home(tmp_path_factory):
    """What this file compiles is compiled once, for this process and those it starts."""
    home = tmp_path_factory.mktemp("cache_home")
    compilation_cache.reset_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        devices.enable_compilation_cache(home / "bnjax" / "programs")
        patch.setattr(devices, "enable_compilation_cache", lambda directory: None)
        yield home
    devices.jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def start(home: Path, *arguments, limit: int | None = None) -> subprocess.Popen:
    """The command in a process of its own, whose files may not grow beyond `limit` bytes."""
    script = (
        "import resource, runpy; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
        "runpy.run_module('experiments.mnist_bn', run_name='__main__')"
    )
    how = ("-m", "experiments.mnist_bn") if limit is None else ("-c", script)
    return subprocess.Popen(
        [sys.executable, *how, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(home)},
    )


@pytest.fixture(scope="module")
def reference(cache_home, tmp_path_factory) -> Reference:
    directory = tmp_path_factory.mktemp("reference")
    for name in ("cold", "warm"):
        running = start(cache_home, *new(directory / name))
        wait_for(running, (directory / name).exists)
        begin = time.monotonic()
        _, err = running.communicate(timeout=120)
        assert (running.returncode, err) == (0, "")
    return Reference(directory / "warm", time.monotonic() - begin)


@pytest.fixture(scope="module")
def three_epochs(reference, tmp_path_factory) -> Path:
    """One epoch short of the reference."""
    path = tmp_path_factory.mktemp("three_epochs") / "run"
    assert call(*new(path, epochs=3)).status == 0
    return path


def wait_for(running: subprocess.Popen, happened: Callable[[], bool]) -> None:
    while running.poll() is None and not happened():
        time.sleep(0.0005)


def look(path: Path) -> list[tuple[str, int, int]]:
    """Names, times and sizes of everything that is there just now."""
    found = []
    inside = [Path(base, name) for base, dirs, files in os.walk(path) for name in dirs + files]
    for file in (path, *inside):
        with contextlib.suppress(OSError):
            stat = file.stat()
            found.append((str(file), stat.st_mtime_ns, stat.st_size))
    return found


def kill(running: subprocess.Popen, path: Path, seconds: float, chance: random.Random) -> str:
    """Kills a run some time after it first wrote to its directory; says when that was."""
    config = look(path / "config.json")
    watched = chance.choice(["", "", "checkpoints", "metrics.jsonl", "probes", "curves.png"])
    delay = chance.uniform(0, 0.05 if watched else seconds)
    wait_for(running, lambda: look(path / "config.json") != config)
    for _ in range(chance.randint(1, 3) if watched else 0):
        before = look(path / watched)
        wait_for(running, lambda seen=before: look(path / watched) != seen)
    time.sleep(delay)
    running.kill()
    running.communicate(timeout=60)
    return f"{delay:.3f} s after {watched or 'the start'}, status {running.returncode}"


def resume_or_begin(path: Path) -> tuple:
    return ("--resume", path) if path.exists() else new(path)


@pytest.mark.parametrize("seed", range(KILLS))
def test_killed_at_a_random_moment(cache_home, reference, tmp_path, seed):
    chance, path, kills = random.Random(seed), tmp_path / "run", 0
    while kills == 0 or chance.random() < 0.4:
        running = start(cache_home, *resume_or_begin(path))
        print("killed", kill(running, path, reference.seconds, chance))
        if running.returncode != 0:
            kills += 1
        elif kills == 0:
            shutil.rmtree(path)  # it was too late: the run had ended

    running = start(cache_home, *resume_or_begin(path))
    _, err = running.communicate(timeout=120)
    assert (running.returncode, err) == (0, "")
    assert_equal_runs(path, reference.path)


def test_killed_again_and_again_it_still_arrives(cache_home, reference, tmp_path):
    """Each time it is killed as soon as it has recorded one epoch more."""
    path, status, kills = tmp_path / "run", None, 0
    while status != 0:
        running = start(cache_home, *resume_or_begin(path))
        wait_for(running, saved(path, kills + 1).exists)
        if kills < EPOCHS:
            running.send_signal(signal.SIGKILL)
        running.communicate(timeout=60)
        status, kills = running.returncode, kills + 1
        assert kills < 10
    assert_equal_runs(path, reference.path)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def replace(file: Path) -> None:
    safetensors.numpy.save_file({"a": np.ones(3)}, file, {"epochs": "3"})


DAMAGES = (truncate, empty, flip, replace)


def notes(result: Result) -> list[str]:
    return [line for line in (result.out + result.err).splitlines() if line.startswith("NOTE")]


class TestDamagedCheckpoint:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_newest_gives_way_to_the_one_before(self, reference, three_epochs, tmp_path, damage):
        path = Path(shutil.copytree(three_epochs, tmp_path / "run"))
        damage(saved(path, 3))
        damaged = saved(path, 3).read_bytes()
        result = call("--resume", path, "--epochs", EPOCHS)
        assert result.status == 0
        assert "going on after epoch 2" in result.out
        (note,) = notes(result)
        assert f"{saved(path, 3)}: it is damaged (" in note
        (aside,) = (path / "checkpoints").glob("damaged-*")
        assert aside.name in note
        assert aside.read_bytes() == damaged
        assert_equal_runs(path, reference.path)

    def test_what_cannot_be_read_just_now_is_left_alone(
        self, reference, three_epochs, tmp_path, monkeypatch
    ):
        def fail(*_, **__):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(saved(path, 3)))

        path = Path(shutil.copytree(three_epochs, tmp_path / "run"))
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.Checkpoints, "at", fail)
            result = call("--resume", path, "--epochs", EPOCHS)
        assert_told(result, path, "checkpoints", os.strerror(errno.EACCES))
        assert call("--resume", path, "--epochs", EPOCHS).status == 0
        assert_equal_runs(path, reference.path)

    def test_all_of_them_give_way_to_the_beginning(self, reference, three_epochs, tmp_path):
        path = Path(shutil.copytree(three_epochs, tmp_path / "run"))
        truncate(saved(path, 3))
        replace(saved(path, 2))
        result = call("--resume", path, "--epochs", EPOCHS)
        assert result.status == 0
        assert "going on after epoch 0" in result.out
        assert len(notes(result)) == 2
        assert_equal_runs(path, reference.path)


def tear_next(file: Path) -> None:
    with file.open("a") as stream:
        stream.write('{"epoch": 4, "arm": "bn", "repl')


def tear_last(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def cut_last(file: Path) -> None:
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))


class TestTornMetrics:
    @pytest.mark.parametrize(
        ("tear", "epochs"), [(tear_next, 3), (tear_last, 2), (cut_last, 2), (Path.unlink, 0)]
    )
    def test_what_is_not_recorded_is_trained_again(
        self, reference, three_epochs, tmp_path, tear, epochs
    ):
        path = Path(shutil.copytree(three_epochs, tmp_path / "run"))
        tear(path / "metrics.jsonl")
        result = call("--resume", path, "--epochs", EPOCHS)
        assert result.status == 0
        assert f"going on after epoch {epochs}\n" in result.out
        assert len(notes(result)) == min(3 - epochs, checkpoint.KEEP)
        assert_equal_runs(path, reference.path)

    def test_damage_in_the_middle_is_refused_and_left_alone(self, three_epochs, tmp_path):
        path = Path(shutil.copytree(three_epochs, tmp_path / "run"))
        content = (path / "metrics.jsonl").read_bytes().replace(b"epoch", b"epoxh", 1)
        (path / "metrics.jsonl").write_bytes(content)
        result = call("--resume", path, "--epochs", EPOCHS)
        assert result.status == 2
        assert "metrics.jsonl is damaged: line 1 does not hold" in result.err
        assert (path / "metrics.jsonl").read_bytes() == content
        assert saved(path, 3).exists()


class TestOneAtATime:
    def test_a_second_process_is_refused(self, three_epochs, tmp_path):
        path = Path(shutil.copytree(three_epochs, tmp_path / "run"))
        with rundir.locked(path):
            result = call("--resume", path, "--epochs", EPOCHS)
        assert result.status == 2
        assert f"{path} is in use by another process" in result.err
        assert call("--resume", path, "--epochs", EPOCHS).status == 0


@pytest.mark.parametrize(("name", "value"), [("batch_size", 50), ("replicates", 2), ("seed", 1)])
def test_settings_changed_in_the_file_are_refused(three_epochs, tmp_path, name, value):
    path = Path(shutil.copytree(three_epochs, tmp_path / "run"))
    config = rundir.read_config(path)
    config["experiment"][name] = value
    rundir.write_json(path / "config.json", config)
    before = files_of(path), (path / "config.json").read_bytes()
    assert call("--resume", path, "--epochs", EPOCHS).status == 2
    assert (files_of(path), (path / "config.json").read_bytes()) == before
    assert len(list((path / "checkpoints").iterdir())) == 2


@pytest.fixture
def hook(monkeypatch):
    """Has something happen before or after the n-th call of a function."""

    def install(target, name: str, action: Callable[[], None], *, calls=1, before=False) -> None:
        original, done = getattr(target, name), []

        def hooked(*arguments, **settings):
            done.append(None)
            if before and len(done) == calls:
                action()
            result = original(*arguments, **settings)
            if not before and len(done) == calls:
                action()
            return result

        monkeypatch.setattr(target, name, hooked)

    return install


class TestRemovedRunDirectory:
    @pytest.mark.parametrize("epoch", [1, 2])
    @pytest.mark.parametrize(
        ("target", "name"),
        [
            (metrics, "append"),
            (checkpoint.Checkpoints, "save"),
        ],
    )
    def test_while_training(self, tmp_path, hook, target, name, epoch):
        path = tmp_path / "run"
        hook(target, name, lambda: shutil.rmtree(path, ignore_errors=True), calls=epoch)
        result = call(*new(path))
        assert_told(result, path, "", "")
        assert not (path / "summary.json").exists()

    def test_before_its_first_checkpoint(self, tmp_path, hook):
        path = tmp_path / "run"
        hook(checkpoint.Checkpoints, "save", lambda: shutil.rmtree(path), before=True)
        assert_told(call(*new(path)), path, "", "")
        assert not path.exists()

    def test_before_the_report(self, tmp_path, hook):
        path = tmp_path / "run"
        hook(report, "redraw", lambda: shutil.rmtree(path), before=True)
        assert_told(call(*new(path)), path, "", "")

    def test_moved_elsewhere_it_goes_on_there(self, reference, tmp_path, hook):
        path, moved = tmp_path / "run", tmp_path / "moved"
        hook(metrics, "append", lambda: path.rename(moved), calls=2)
        assert_told(call(*new(path)), path, "", "")
        assert call("--resume", moved).status == 0
        assert_equal_runs(moved, reference.path)


class TestDiskFull:
    def test_without_a_place_for_checkpoints_it_ends(self, cache_home, three_epochs, tmp_path):
        path = Path(shutil.copytree(three_epochs, tmp_path / "run"))
        shutil.rmtree(path / "checkpoints")
        (path / "checkpoints").write_text("")
        running = start(cache_home, "--resume", path, "--epochs", EPOCHS)
        out, err = running.communicate(timeout=60)
        assert_told(Result(running.returncode, out, err), path, "checkpoints", "File exists")

    @pytest.mark.parametrize(
        ("limit", "file"),
        [(50_000, "checkpoints"), (100_000, "curves.png"), (150_000, "report.html")],
    )
    def test_in_a_process_of_its_own(self, cache_home, reference, tmp_path, limit, file):
        path = tmp_path / "run"
        running = start(cache_home, *new(path), limit=limit)
        out, err = running.communicate(timeout=120)
        assert_told(Result(running.returncode, out, err), path, file, "File too large")
        assert call("--resume", path).status == 0
        assert_equal_runs(path, reference.path)

    @pytest.mark.skipif(not FULL.exists(), reason="this system has no device that is always full")
    @pytest.mark.parametrize(
        "file",
        ["metrics.jsonl", "probes/epoch-002.npz", "features.png", "report.html", "summary.json"],
    )
    def test_of_every_file(self, reference, tmp_path, hook, file):
        path = tmp_path / "run"
        place = path / file
        if file != "metrics.jsonl":
            place = place.with_name(f".{place.name}.partial")

        def fill() -> None:
            if place.exists():
                place.rename(tmp_path / "kept")
            place.symlink_to(FULL)

        hook(checkpoint.Checkpoints, "save", fill)
        assert_told(call(*new(path)), path, file, os.strerror(errno.ENOSPC))
        if place.is_symlink():
            place.unlink()
        if (tmp_path / "kept").exists():
            (tmp_path / "kept").rename(place)
        assert call("--resume", path).status == 0
        assert_equal_runs(path, reference.path)

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
    def test_configuration(self, tmp_path, monkeypatch, code):
        def fail(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(rundir, "write_bytes", fail)
        path = tmp_path / "run"
        assert_told(call(*new(path)), path, "", os.strerror(code))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.skipif(not FULL.exists(), reason="this system has no device that is always full")
    def test_configuration_of_a_run_to_resume(self, reference, three_epochs, tmp_path):
        path = Path(shutil.copytree(three_epochs, tmp_path / "run"))
        before = (path / "config.json").read_bytes()
        (path / ".config.json.partial").symlink_to(FULL)
        result = call("--resume", path, "--epochs", EPOCHS)
        assert_told(result, path, "config.json", os.strerror(errno.ENOSPC))
        assert (path / "config.json").read_bytes() == before
        assert json.loads((path / "summary.json").read_text())["epochs"] == 3
        (path / ".config.json.partial").unlink()
        assert call("--resume", path, "--epochs", EPOCHS).status == 0
        assert_equal_runs(path, reference.path)

"""Several processes on this machine, as they would run on several hosts."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import Result, assert_same_numbers, call, lines_of
from factories import noise, write_idx

from bnjax.checkpoint import file_of
from bnjax.parallel import processes
from experiments.lab import divergences, rundir

pytestmark = pytest.mark.slow

NETWORK = "--dataset", "digits", "--hidden-sizes", 8, 8, "--batch-size", 96, "--no-progress"
LIMIT = 60
README = Path(__file__).parents[1] / "README.md"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def start(home):
    """Starts the command in so many processes; `own` are further arguments of single ones."""
    running: list[subprocess.Popen] = []

    def begin(count: int, *arguments, own=None) -> list[subprocess.Popen]:
        group = "--distributed", "--coordinator", f"127.0.0.1:{free_port()}"
        for k in range(count):
            words = (*group, "--num-processes", count, "--process-id", k, *arguments)
            words = (*words, *(own or {}).get(k, ()))
            running.append(
                subprocess.Popen(
                    [sys.executable, "-m", "experiments.mnist_bn", *map(str, words)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "XDG_CACHE_HOME": str(home)},
                )
            )
        return running[-count:]

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def end(processes, timeout=180) -> list[Result]:
    results = []
    for process in processes:
        out, err = process.communicate(timeout=timeout)
        results.append(Result(process.returncode, out, err))
    return results


def errors(result: Result) -> list[str]:
    return [line for line in result.err.splitlines() if line.startswith("error")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("alone") / "run"
    assert call(*NETWORK, *REPLICATES, "--mesh", "replicate=1", "--out", path).status == 0
    return path


REPLICATES = "--replicates", 2, "--epochs", 6
SHARED = "--mesh", "replicate=1,data=2"


@pytest.fixture(scope="module")
def pair(start, tmp_path_factory) -> tuple[Path, list[Result]]:
    """A run of two processes that share each batch."""
    path = tmp_path_factory.mktemp("pair") / "run"
    return path, end(start(2, *NETWORK, *REPLICATES, *SHARED, "--out", path))


def test_the_first_process_tells_and_all_compute_what_one_does(pair, alone):
    path, (first, other) = pair
    assert (first.status, other.status) == (0, 0), (first.err, other.err)
    assert f"report: {path / 'report.html'}" in first.out
    assert other.out == ""
    assert_same_numbers(path, alone)


@pytest.mark.parametrize("mesh", ["replicate=2,data=1", "auto"])
def test_replicates_on_processes_are_bitwise_those_of_one(start, alone, tmp_path, mesh):
    path = tmp_path / "run"
    results = end(start(2, *NETWORK, *REPLICATES, "--mesh", mesh, "--out", path))
    assert [result.status for result in results] == [0, 0], results
    assert rundir.read_config(path)["mesh"] == {"replicate": 2, "data": 1}
    assert lines_of(path) == lines_of(alone)


def wait_for(processes, path: Path) -> None:
    limit = time.monotonic() + 120
    while not path.exists() and time.monotonic() < limit:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    assert path.exists()


@pytest.mark.parametrize(
    ("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)]
)
def test_a_lost_process_ends_the_others(start, tmp_path, victim, number):
    path = tmp_path / "run"
    processes = start(2, *NETWORK, *REPLICATES[:2], "--epochs", 2000, *SHARED, "--out", path)
    wait_for(processes, file_of(path / "checkpoints", 2))
    processes[victim].send_signal(number)
    begin = time.monotonic()
    out, err = processes[1 - victim].communicate(timeout=LIMIT)
    assert time.monotonic() - begin < LIMIT
    assert processes[1 - victim].returncode != 0
    processes[victim].kill()
    processes[victim].communicate()
    hint = f"go on with: python -m experiments.mnist_bn --resume {path}"
    if victim == 1:
        assert f"should a process be lost, {hint}" in out
    if (victim, number) == (1, signal.SIGKILL):
        assert processes[0].returncode == 1
        assert errors(Result(1, out, err)) == [f"error: another process is lost; {hint}"]


@pytest.fixture(scope="module")
def killed(start, tmp_path_factory) -> Path:
    """A run of two processes that was killed soon after its second epoch."""
    path = tmp_path_factory.mktemp("killed") / "run"
    processes = start(2, *NETWORK, *REPLICATES, *SHARED, "--out", path)
    wait_for(processes, file_of(path / "checkpoints", 2))
    for process in processes:
        process.kill()
    end(processes)
    return path


def test_as_many_processes_go_on_bitwise(start, killed, pair, tmp_path):
    path = Path(shutil.copytree(killed, tmp_path / "run"))
    results = end(start(2, "--resume", path))
    assert [result.status for result in results] == [0, 0], results
    assert "going on after epoch" in results[0].out
    assert lines_of(path) == lines_of(pair[0])


@pytest.mark.parametrize(("count", "mesh"), [(1, "auto"), (4, "replicate=2,data=2")])
def test_other_numbers_of_processes_go_on(start, killed, alone, tmp_path, count, mesh):
    path = Path(shutil.copytree(killed, tmp_path / "run"))
    again = "--resume", path, "--mesh", mesh
    results = [call(*again)] if count == 1 else end(start(count, *again))
    assert [result.status for result in results] == [0] * count, results
    assert "going on after epoch" in results[0].out
    assert_same_numbers(path, alone)


@pytest.mark.parametrize(
    ("count", "resumed", "told"),
    [
        (
            2,
            False,
            "2 processes have 2 devices together, of which 1 replicate can use 1: choose "
            "--mesh replicate=1,data=2, which",
        ),
        (
            4,
            True,
            "4 processes have 4 devices together, of which 2 replicates can use 2: choose "
            "--mesh replicate=2,data=2, which",
        ),
    ],
)
def test_batches_are_not_spread_over_processes_unasked(
    start, killed, tmp_path, count, resumed, told
):
    path = tmp_path / "run"
    if resumed:
        shutil.copytree(killed, path)
    words = ("--resume", path, "--mesh", "auto") if resumed else (*NETWORK, "--out", path)
    first, *others = end(start(count, *words))
    assert first.status == 2
    assert [one.startswith(f"error: {told}") for one in errors(first)] == [True]
    assert [(other.status, errors(other)) for other in others] == [(2, [])] * len(others)
    assert path.exists() == resumed


def test_a_damaged_checkpoint_gives_way_in_all_processes(start, killed, pair, tmp_path):
    path = Path(shutil.copytree(killed, tmp_path / "run"))
    newest = max((path / "checkpoints").glob("epoch-*"))
    last = int(newest.stem.removeprefix("epoch-"))
    newest.write_bytes(b"")
    results = end(start(2, "--resume", path))
    assert [result.status for result in results] == [0, 0], results
    assert f"going on after epoch {last - 1}" in results[0].out
    assert lines_of(path) == lines_of(pair[0])


def test_a_checkpoint_that_cannot_be_written_ends_all_processes(start, killed, tmp_path):
    path = Path(shutil.copytree(killed, tmp_path / "run"))
    shutil.rmtree(path / "checkpoints")
    (path / "checkpoints").write_text("")
    first, other = end(start(2, "--resume", path))
    assert (first.status, other.status) == (2, 2)
    told = f"error: {path / 'checkpoints'}: File exists; go on with: "
    assert [one.startswith(told) for one in errors(first)] == [True]
    assert f"{socket.gethostname()} (process 0): [Errno 17] File exists" in other.err
    assert "Traceback" not in other.err


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (("--learning-rate", 0.5), "learning_rate 0.5 instead of 0.001"),
        (("--seed", 7), "seed 7 instead of 0"),
        (("--dataset", "kmnist"), "dataset 'kmnist' instead of 'digits'"),
        (("--mesh", "data=2"), "mesh 'data=2' instead of 'auto'"),
    ],
)
def test_a_process_with_other_settings_is_refused_by_name(start, tmp_path, own, message):
    first, other = end(start(2, *NETWORK, "--out", tmp_path / "run", own={1: own}))
    assert (first.status, other.status) == (2, 2)
    assert errors(first) == [f"error: {socket.gethostname()} (process 1) has {message}"]
    assert errors(other) == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("exists", [True, False], ids=["other", "none"])
def test_a_process_with_other_data_is_refused_by_name(start, tmp_path, exists):
    write_idx(tmp_path / "data", *noise(300, 100))
    if exists:
        write_idx(tmp_path / "other", *noise(300, 100, seed=1))
    own = {k: ("--data-dir", tmp_path / name) for k, name in ((0, "data"), (1, "other"))}
    words = "--dataset", "kmnist", *SHARED, "--out", tmp_path / "run"
    first, other = end(start(2, *words, own=own))
    assert (first.status, other.status) == (2, 2)
    (told,) = errors(first)
    assert f"{socket.gethostname()} (process 1)" in told
    assert ("sha256" if exists else "no such directory") in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("statistics", "layers"), [("global", ["BatchNorm_0", "Dense_1"]), ("local", [None, None])]
)
def test_divergence_ends_all_processes_alike(start, tmp_path, statistics, layers):
    path = tmp_path / "run"
    settings = "--epochs", 2, "--learning-rate", 1e30, "--bn-statistics", statistics
    results = end(start(2, *NETWORK, *settings, *SHARED, "--out", path))
    assert [result.status for result in results] == [3, 3], results
    marks = divergences.read(path)
    assert [mark["arm"] for mark in marks] == ["bn", "no_bn"]
    assert [mark["layer"] for mark in marks] == layers


def test_process_0_is_not_where_it_should_be(monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 1)
    with pytest.raises(ValueError, match="process 0 does not answer at"):
        processes.start(f"127.0.0.1:{free_port()}", 2, 1)


def test_the_port_is_taken():
    with (
        socket.create_server(("", 0)) as taken,
        pytest.raises(ValueError, match="process 0 cannot listen at port"),
    ):
        processes.start(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0)


@pytest.mark.parametrize("address", ["", "here", ":1", "here:", "here:0", "here:99999", "here:x"])
def test_an_address_without_a_port_is_refused(address):
    with pytest.raises(ValueError, match="expected HOST:PORT"):
        processes.start(address, 2, 0)


def test_a_mesh_must_have_all_devices(start, tmp_path):
    mesh = "--mesh", "replicate=3,data=1"
    first, other = end(start(2, *NETWORK, *mesh, "--out", tmp_path / "run"))
    assert (first.status, other.status) == (2, 2)
    assert "mesh replicate=3,data=1 has 3 devices: 2 processes have 2 together" in first.err


def test_the_script_of_the_readme(home, tmp_path):
    """SLURM is played by a program that starts two processes with its variables."""
    (script,) = re.findall(r"```bash\n(#!.*?)```", README.read_text(), flags=re.DOTALL)
    (tmp_path / "job").write_text(script)
    ports = range(61440, 65536)
    (tmp_path / "srun").write_text(
        "#!/bin/bash\nshift\n"
        'for k in 0 1; do SLURM_PROCID=$k SLURM_LOCALID=$k "$@" > $k.out & jobs="$jobs $!"; done\n'
        "for job in $jobs; do wait $job || exit; done\n"
    )
    (tmp_path / "srun").chmod(0o755)
    write_idx(tmp_path / "data", *noise(300, 100))
    surroundings = {
        **os.environ,
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(README.parent),
        "XDG_CACHE_HOME": str(home),
        "BNJAX_DATA_DIR": str(tmp_path / "data"),
        "SLURM_JOB_NAME": "digits",
        "SLURM_JOB_ID": str(next(port for port in ports if is_free(port)) - ports[0]),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
    }
    for told in ("After 15 epochs", "is finished"):
        ended = subprocess.run(
            ["bash", "job"], cwd=tmp_path, env=surroundings, capture_output=True, timeout=180
        )
        assert ended.returncode == 0, ended.stderr
        assert told in (tmp_path / "0.out").read_text()
    config = rundir.read_config(tmp_path / "runs" / "digits")
    assert config["mesh"] == {"replicate": 2, "data": 1}
    assert config["experiment"]["replicates"] == 32
    assert config["process_count"] == 2


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) != 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--coordinator", "here:1"), "belong together"),
        (("--distributed", "--process-id", 1), "belong together"),
        (
            ("--distributed", "--coordinator", "h:1", "--num-processes", 2, "--process-id", 2),
            "process_id is 2: expected 0 to 1",
        ),
    ],
)
def test_settings_that_do_not_fit(arguments, message):
    result = call("--dataset", "digits", *arguments)
    assert result.status == 2
    assert message in " ".join(result.err.replace("│", " ").split())

"""What a run finds around it changes neither its pictures nor whether it runs."""

import os
import shutil
import subprocess
import sys
import tomllib
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
from factories import named, save_run

from experiments import compare, report
from experiments.claims import Evidence, load_claims, verdicts
from experiments.lab import Run, metrics, rundir
from experiments.lab.cells import SweepCell
from experiments.lab.presets import BOOSTCOURSE
from experiments.report import figures, heat

ROOT = Path(__file__).parents[1]
TWO = ("bn", "no_bn")

# What somebody likes, in the words of a matplotlibrc.
TASTES = {
    "TeX": {"text.usetex": "True"},
    "fonts": {
        "font.family": "monospace",
        "font.size": "17",
        "mathtext.fontset": "stix",
        "axes.titlesize": "30",
        "axes.formatter.use_mathtext": "True",
    },
    "colours": {
        "figure.facecolor": "black",
        "axes.facecolor": "navy",
        "axes.edgecolor": "white",
        "text.color": "yellow",
        "axes.prop_cycle": "cycler('color', ['red', 'yellow'])",
        "image.cmap": "jet",
        "patch.edgecolor": "red",
    },
    "lines": {
        "lines.linewidth": "9",
        "lines.dashed_pattern": "1, 9",
        "lines.markeredgewidth": "5",
        "lines.antialiased": "False",
        "axes.linewidth": "4",
        "axes.grid": "True",
        "grid.linestyle": ":",
        "xtick.direction": "in",
        "path.sketch": "10, 100, 20",
    },
    "sizes": {
        "figure.dpi": "31",
        "figure.constrained_layout.w_pad": "1",
        "figure.subplot.left": "0.4",
        "axes.xmargin": "0.4",
        "hist.bins": "3",
        "image.interpolation": "bicubic",
    },
    "files": {
        "savefig.dpi": "30",
        "savefig.bbox": "tight",
        "savefig.facecolor": "red",
        "savefig.transparent": "True",
        "svg.fonttype": "path",
        "svg.hashsalt": "theirs",
        "svg.id": "theirs",
    },
}


@pytest.fixture(scope="module")
def made_up_runs(tmp_path_factory) -> list[Path]:
    path = tmp_path_factory.mktemp("runs")
    for name, sizes, arms in (("first", (8, 8), (*TWO, "layer_norm")), ("second", (9, 7, 5), TWO)):
        changes = {"dataset": "digits", "epochs": 3, "hidden_sizes": sizes, "arms": arms}
        experiment = replace(BOOSTCOURSE, reference="no_bn", **changes)
        save_run(path / name, experiment, replicates=2)
    return [path / "first", path / "second"]


def draw(made_up_runs: list[Path]) -> dict[str, bytes]:
    """All kinds of pictures, and the page that holds some of them."""
    run = made_up_runs[0]
    place = run.parent
    report.redraw(run)
    compare.write(place / "compared", {run.name: Run(run) for run in made_up_runs})
    names = ("curves.png", "curves.svg", "features.png", "report.html")
    drawn = {name: (run / name).read_bytes() for name in names}
    drawn["compare.svg"] = (place / "compared" / "compare.svg").read_bytes()

    values = {arm: {name: [0.5, 0.75] for name in metrics.METRICS} for arm in TWO}
    grid = [(size, rate) for size in (8, 32) for rate in (0.1, 0.01)]
    base = replace(BOOSTCOURSE, reference="no_bn")
    cells = [SweepCell(replace(base, batch_size=s, learning_rate=r), values) for s, r in grid]
    drawn["sweep.svg"] = figures.to_svg(heat.maps(cells, named(["bn"], "label")))

    claim = load_claims()["depth-limit"]
    accuracies = {arm: [[50, 60], [40, 20]] for arm in TWO}
    evidence = Evidence({}, {"panels": {"Accuracy": accuracies}, "x": [2, 4]})
    figure = place / "figure.png"
    figure.unlink(missing_ok=True)
    verdicts._figure(figure, claim, evidence)
    drawn["claim"] = figure.read_bytes()

    votes = [3, 17, *[0] * 8]
    numbers = {
        "dropout": {"torn_votes": votes, "torn_evaluation": 1, "torn_label": 1},
        "alone": {"twice": votes, "evaluation": votes, "accuracy": 0.1},
        "groups": {
            "training": {2: {"accuracy": 0.5}, 10: {"accuracy": 0.8}},
            "evaluation": {"accuracy": 0.9},
        },
    }
    drawn["modes"] = figures.to_png(figures.train_eval_mode(numbers))
    return drawn


@pytest.fixture(scope="module")
def drawn(made_up_runs) -> dict[str, bytes]:
    return draw(made_up_runs)


class TestPictures:
    def test_of_a_notebook_with_tastes(self, made_up_runs, drawn):
        with matplotlib.rc_context({k: v for taste in TASTES.values() for k, v in taste.items()}):
            before = dict(matplotlib.rcParams)
            found = draw(made_up_runs)
            assert dict(matplotlib.rcParams) == before
        assert [name for name in drawn if found[name] != drawn[name]] == []

    @pytest.mark.slow
    @pytest.mark.parametrize("content", ["taste", b"\xff\xfe", None])
    def test_of_a_command_with_a_matplotlibrc(self, made_up_runs, drawn, tmp_path, content):
        """One of taste, one that is damaged, and a backend that is not there."""
        file = tmp_path / "matplotlibrc"
        lines = [f"{name}: {value}\n" for taste in TASTES.values() for name, value in taste.items()]
        file.write_bytes("".join(lines).encode() if content == "taste" else content or b"")
        backend = {} if content else {"MPLBACKEND": "nonsense"}
        run = made_up_runs[0]
        subprocess.run(
            [sys.executable, "-m", "experiments.report", run],
            env={**os.environ, "MATPLOTLIBRC": str(file), **backend},
            check=True,
        )
        names = [name for name in drawn if (run / name).exists()]
        assert [name for name in names if (run / name).read_bytes() != drawn[name]] == []
        assert len(names) == 4


# What a Python does first that lacks modules, or whose files lie where there are no real locks.
SYSTEMS = {
    "as it is": "",
    "without fcntl": """
import sys
sys.modules |= dict.fromkeys(("fcntl", "pwd", "grp", "termios"))
""",
    "without flock": """
import errno, fcntl
def flock(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")
fcntl.flock = flock
""",
}
KEEP = """
import pathlib, sys
from experiments.lab import rundir
with rundir.locked(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""
RUN = """
import runpy
runpy.run_module("experiments.mnist_bn", run_name="__main__", alter_sys=True)
"""


def start(script: str, *arguments) -> subprocess.Popen:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], text=True, **pipes
    )


@pytest.mark.slow
def test_a_run_goes_on_without_fcntl(tmp_path):
    path = tmp_path / "run"
    for arguments in (["--dataset", "digits", "--epochs", 1, "--out"], ["--epochs", 2, "--resume"]):
        running = start(SYSTEMS["without fcntl"] + RUN, *arguments, path)
        assert (running.communicate()[1], running.returncode) == ("", 0)
    assert rundir.is_finished(path, 2)
    assert not (path / ".lock").exists()


class TestLock:
    @pytest.mark.parametrize(
        "system",
        [
            pytest.param(s, marks=pytest.mark.slow if script else [])
            for s, script in SYSTEMS.items()
        ],
    )
    def test_ends_with_its_process(self, tmp_path, system):
        keep = SYSTEMS[system] + KEEP
        with start(keep, tmp_path) as first:
            assert first.stdout.readline() == "locked\n"
            _, told = start(keep, tmp_path).communicate()
            assert f"{tmp_path} is in use by another process: wait for its end, or delete" in told
            first.kill()
        with start(keep, tmp_path) as second:
            assert second.stdout.readline() == "locked\n"
            assert second.communicate() == ("", "")
        assert list(tmp_path.iterdir()) == []

    def test_is_no_more_after_an_error(self, tmp_path):
        for _ in range(2):
            with pytest.raises(ZeroDivisionError), rundir.locked(tmp_path):
                raise ZeroDivisionError
        assert list(tmp_path.iterdir()) == []

    def test_of_a_directory_that_is_gone(self, tmp_path):
        with ExitStack() as stack, pytest.raises(FileNotFoundError) as caught:
            stack.enter_context(rundir.locked(tmp_path / "gone"))
        assert caught.value.filename == str(tmp_path / "gone")
        with rundir.locked(tmp_path):
            shutil.rmtree(tmp_path)

    def test_that_cannot_be_made_is_named(self, tmp_path):
        (tmp_path / ".lock").mkdir()
        with ExitStack() as stack, pytest.raises(OSError, match=r"\.lock"):
            stack.enter_context(rundir.locked(tmp_path))


def test_readme_and_metadata_say_what_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    kinds = ("Operating System :: ", "Programming Language :: Python :: 3.")
    tested = [one.split(" :: ")[-1] for one in project["classifiers"] if one.startswith(kinds)]
    readme = (ROOT / "README.md").read_text()
    (sentence,) = (line for line in readme.split("\n\n") if "is tested on" in line)
    assert [name for name in (*tested, "macOS", "Windows") if name not in sentence] == []

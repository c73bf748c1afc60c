"""The README keeps its promises: its snippets run, and so do its commands, as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command import call
from factories import write_idx

from bnjax import data

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
# What installs is run by .ci/run in a fresh environment, the SLURM script by test_processes.py,
# each of all claims by test_claims.py.
ELSEWHERE = ("pip install", "#SBATCH", "reproduce all")
COMMANDS = [block for block in BLOCKS if not any(part in block for part in ELSEWHERE)]
MODULES = sorted(set(re.findall(r"python -m (experiments\.\w+)", TEXT)))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Where a reader has run the first command: on digits, and with networks that
    test_after_training.py has, too: what one compiles the other finds."""
    home = tmp_path_factory.mktemp("home")
    network = "--hidden-sizes", 5, "--num-classes", 10
    arguments = "--dataset", "digits", *network, "--epochs", 1, "--out", home / "runs" / "first"
    assert call(*arguments).status == 0
    return home


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets_run(snippet, home, monkeypatch):
    monkeypatch.chdir(home)
    exec(compile(snippet, str(README), "exec"), {})


def test_files_that_are_named_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (README.parent / target).exists(), target


def test_files_of_the_project_have_their_place_in_the_table():
    table = TEXT[TEXT.index("## Where things are") :]
    told = set(re.findall(r"`(?:\w+/)*(\w+)\.(?:py|ipynb)`", table))
    for package in ("bnjax", "experiments"):
        for file in (README.parent / package).glob("*.py"):
            assert file.stem in told | {"__init__", "version", "errors", "names"}, file


def run(command: str, place: Path, **environment) -> subprocess.CompletedProcess:
    """A shell command as a reader would give it, in a directory of its own."""
    paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-euc", command],
        cwd=place,
        env={**os.environ, "PATH": paths, "PYTHONPATH": str(README.parent), **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_commands_explain_themselves(module, tmp_path):
    assert f"usage: python -m {module}" in run(f"python -m {module} --help", tmp_path).stdout


@pytest.mark.slow
def test_commands_run(tmp_path):
    """All of them, from the first to the last, on 600 digits in place of MNIST."""
    digits = data.load("digits")
    write_idx(
        tmp_path / "data",
        *(digits.train_images[:600], digits.train_labels[:600]),
        *(digits.test_images[:200], digits.test_labels[:200]),
    )
    told = {"BNJAX_DATA_DIR": str(tmp_path / "data"), "BROWSER": "true"}
    for block in COMMANDS:
        result = run(block, tmp_path, **told)
        assert result.returncode == 0, f"{block}\n{result.stdout}\n{result.stderr}"
    pages = {str(page.relative_to(tmp_path)) for page in tmp_path.glob("runs/*/*.html")}
    named = re.findall(r"runs/\w+/\w+\.html", TEXT)
    assert named
    assert {*named, "runs/two/report.html"} <= pages


def test_the_table_of_results_is_consistent():
    """The first screen repeats the accuracies of the table further down."""
    first, *rest = re.findall(r"\d\d\.\d\d ± \d\.\d\d %", TEXT)
    assert [first, *rest[:5]] == rest[5:11]

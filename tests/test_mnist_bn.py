"""The whole command: its run directory, its errors, going on, stopping."""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import webbrowser
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from command import Result, call, lines_of
from factories import noise, write_idx

from bnjax import data, paired
from bnjax.data import download
from bnjax.errors import CheckpointError, DownloadError
from bnjax.paired import Arm, Placement, Trainer
from bnjax.statistics import summarize
from bnjax.training import Batch
from experiments import report
from experiments.lab import Run, devices, divergences, metrics, rundir
from experiments.lab.options import Execution
from experiments.lab.presets import DEEP10, NOTEBOOKS, Experiment, from_json

pytestmark = pytest.mark.usefixtures("cache_home")

DIGITS = ("--dataset", "digits")
SMALL = ("--preset", "deep10", "--hidden-sizes", "5", "--batch-size", "100", "--drop-last")
KEYS = [
    *("epoch", "arm", "replicate", "train_cost", "train_loss", "train_accuracy"),
    *("test_loss", "test_accuracy", "seconds"),
]
ARMS = ("bn", "no_bn")
LABELS = {"bn": "with BN", "no_bn": "without BN"}
COSTS = {"train_cost", "train_loss", "test_loss"}
ACCURACIES = {"train_accuracy", "test_accuracy"}


class Job(NamedTuple):
    path: Path
    result: Result


def plain(text: str) -> str:
    """Text without the boxes and the line breaks that tyro and rich put into it."""
    return " ".join(re.sub("[─-╿]", " ", text).split())


def contents(path: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(file.relative_to(path)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in path.rglob("*")
        if file.is_file()
    }


def copy(run: Job, path: Path) -> Path:
    return Path(shutil.copytree(run.path, path))


def edit_config(path: Path, change) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


@pytest.fixture
def process(cache_home, tmp_path):
    """Starts the command in a process of its own."""
    unwanted = {"XLA_FLAGS", "FORCE_COLOR"}
    clean = {name: value for name, value in os.environ.items() if name not in unwanted}
    # A shell that started pytest in the background has it ignore Ctrl-C, and so its children.
    script = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('experiments.mnist_bn', run_name='__main__')"
    )

    def start(*arguments, **environment) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**clean, "XDG_CACHE_HOME": str(cache_home), **environment},
        )

    return start


@pytest.fixture(scope="module")
def finished(cache_home, tmp_path_factory) -> Job:
    path = tmp_path_factory.mktemp("finished") / "run"
    return Job(path, call(*SMALL, *DIGITS, "--epochs", 2, "--out", path, pictures=True))


@pytest.fixture(scope="module")
def halfway(cache_home, tmp_path_factory) -> Job:
    path = tmp_path_factory.mktemp("halfway") / "run"
    return Job(path, call(*SMALL, *DIGITS, "--epochs", 1, "--out", path))


@pytest.fixture(scope="module")
def three(cache_home, tmp_path_factory) -> Job:
    """Three replicates of what `finished` has one of."""
    path = tmp_path_factory.mktemp("three") / "run"
    return Job(path, call(*SMALL, *DIGITS, "--epochs", 2, "--replicates", 3, "--out", path))


class TestRunDirectory:
    def test_success(self, finished):
        assert finished.result.status == 0
        assert finished.result.err == ""

    def test_files(self, finished):
        assert {file.name for file in finished.path.iterdir()} == {
            *("config.json", "metrics.jsonl", "summary.json", "probes", "checkpoints"),
            *("curves.png", "curves.svg", "features.png", "report.html"),
        }
        assert {file.name for file in (finished.path / "probes").iterdir()} == {
            *("end.npz", "epoch-001.npz", "epoch-002.npz", "example.npz"),
        }

    def test_nothing_is_left_beside_it(self, finished):
        assert list(finished.path.parent.iterdir()) == [finished.path]

    def test_config_holds_the_resolved_settings(self, finished):
        config = rundir.read_config(finished.path)
        assert from_json(Experiment, config["experiment"]) == dataclasses.replace(
            DEEP10,
            reference="no_bn",
            dataset="digits",
            epochs=2,
            hidden_sizes=(5,),
            batch_size=100,
            drop_last=True,
        )
        assert set(config["execution"]) == {f.name for f in dataclasses.fields(Execution)}
        assert config["execution"]["out"] == str(finished.path)

    def test_config_holds_the_provenance(self, finished):
        config = rundir.read_config(finished.path)
        assert {"bnjax", "jax", "flax", "optax", "python"} <= set(config["versions"])
        assert config["versions"]["jax"] == jax.__version__
        assert config["device_kind"] == jax.devices()[0].device_kind
        assert config["device_count"] == jax.device_count()
        assert config["process_count"] == 1
        assert config["mesh"] == {"replicate": 1, "data": 1}
        assert re.fullmatch("[0-9a-f]{40}|None", str(config["git_commit"]))
        assert config["dataset"]["name"] == "digits"
        assert config["dataset"]["sha256"] == data.fingerprint(data.load("digits"))
        assert re.fullmatch("[0-9a-f]{64}", config["dataset"]["sha256"])

    def test_metrics(self, finished):
        lines = Run(finished.path).lines
        assert [list(line) for line in lines] == [KEYS] * 4
        assert [(line["epoch"], line["arm"], line["replicate"]) for line in lines] == [
            *((1, "bn", 0), (1, "no_bn", 0), (2, "bn", 0), (2, "no_bn", 0)),
        ]
        for line in lines:
            assert all(0 < line[name] < 10 for name in COSTS)
            assert all(0 <= line[name] <= 1 for name in ACCURACIES)
            assert 0 < line["seconds"] < 60
        assert lines[2]["train_cost"] < lines[0]["train_cost"]

    def test_accuracies_count_every_example(self, finished):
        for line in Run(finished.path).lines:
            for name, count in (("train_accuracy", 1437), ("test_accuracy", 360)):
                assert line[name] * count == pytest.approx(round(line[name] * count), abs=1e-6)

    def test_both_arms_share_the_epochs_seconds(self, finished):
        seconds = [line["seconds"] for line in Run(finished.path).lines]
        assert seconds[0] == seconds[1] != seconds[2] == seconds[3]

    def test_summary_is_of_the_last_epoch(self, finished):
        summary = json.loads((finished.path / "summary.json").read_text())
        lines = Run(finished.path).lines
        expected = metrics.summarize(metrics.curves(lines, ARMS), "no_bn")
        assert summary == json.loads(json.dumps({**expected, "divergences": []}))
        assert summary["arms"]["bn"]["test_loss"]["mean"] == lines[2]["test_loss"]
        assert summary["differences"]["bn"]["test_loss"]["mean"] == pytest.approx(
            lines[2]["test_loss"] - lines[3]["test_loss"]
        )

    def test_probes_see_both_arms(self, finished):
        with np.load(finished.path / "probes" / "epoch-002.npz") as probes:
            shapes = {name: probes[name].shape for name in probes}
        expected = {
            "features_1": (1, 1, 5),
            "gradient_norms": (1, 2),
            "percentiles": (1, 1, 5),
            "histograms": (1, 1, 60),
            "edges": (1, 1, 61),
        }
        assert shapes == {
            f"{arm}/{name}": shape for arm in ARMS for name, shape in expected.items()
        }

    def test_the_example_is_of_the_chosen_class(self, finished):
        with np.load(finished.path / "probes" / "example.npz") as example:
            assert example["label"] == 6
            assert example["image"].shape == (28, 28)

    def test_one_line_per_epoch_and_the_closing_table(self, finished):
        assert re.findall(r"^(\d+/\d+) ", finished.result.out, re.MULTILINE) == ["1/2", "2/2"]
        table = finished.result.out.split("After 2 epochs")[1]
        last = Run(finished.path).lines[-2:]
        for line in last:
            assert f"{line['test_loss']:.4f}" in table
            assert f"{100 * line['test_accuracy']:.2f} %" in table

    def test_output_says_where_the_report_is(self, finished):
        assert str(finished.path / "report.html") in finished.result.out


class References(HTMLParser):
    """Collects what a page refers to, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        loading = {"src", "href", "srcset", "data", "action", "poster"}
        self.references += [value for name, value in attrs if name in loading]

    def handle_data(self, text):
        self.text += text


@pytest.fixture(scope="module")
def page(finished) -> References:
    return References((finished.path / "report.html").read_text())


class TestReport:
    def test_needs_no_network_and_no_other_file(self, page, finished):
        assert len(page.references) >= 7
        assert all(value.startswith(("data:image/", "#")) for value in page.references)
        assert not {"script", "link", "iframe", "base"} & page.tags
        assert not re.search(r"@import|url\(", (finished.path / "report.html").read_text())

    def test_holds_the_final_numbers(self, page, finished):
        for line in Run(finished.path).lines[-2:]:
            assert all(f"{line[name]:.4f}" in page.text for name in COSTS)
            assert all(f"{100 * line[name]:.2f} %" in page.text for name in ACCURACIES)

    def test_holds_what_was_published_and_its_errata(self, page):
        text = plain(page.text)
        source, published, errata = NOTEBOOKS["deep10"].values()
        assert errata
        assert all(told in text for told in (*published, *errata, source))

    def test_holds_the_configuration_and_the_command(self, page, finished):
        config = rundir.read_config(finished.path)
        text = plain(page.text)
        assert config["dataset"]["sha256"] in text
        assert config["versions"]["jax"] in text
        assert all(name in text for name in config["experiment"])
        assert "--preset deep10 --dataset digits --epochs 2 --batch-size 100" in text

    def test_digits_that_were_asked_for_are_no_fallback(self, page, finished):
        assert "could not be had" not in page.text
        assert "NOTE" not in finished.result.out


class TestReproducibility:
    def test_same_seed_same_numbers(self, finished, tmp_path):
        out = tmp_path / "run"
        assert call(*SMALL, *DIGITS, "--epochs", 2, "--out", out, pictures=True).status == 0
        assert lines_of(out) == lines_of(finished.path)
        for name in ("curves.svg", "features.png", "summary.json"):
            assert (out / name).read_bytes() == (finished.path / name).read_bytes()

    def test_other_seed_other_numbers(self, halfway, tmp_path):
        out = tmp_path / "run"
        assert call(*SMALL, *DIGITS, "--epochs", 1, "--seed", 1, "--out", out).status == 0
        for mine, other in zip(lines_of(out), lines_of(halfway.path), strict=True):
            assert all(mine[name] != other[name] for name in COSTS)

    def test_a_replicate_does_not_depend_on_their_number(self, finished, three):
        assert three.result.status == 0
        first = [line for line in lines_of(three.path) if line["replicate"] == 0]
        assert first == lines_of(finished.path)

    def test_replicates_differ(self, three):
        for epoch in (1, 2):
            for arm in ARMS:
                mine = [x for x in lines_of(three.path) if (x["epoch"], x["arm"]) == (epoch, arm)]
                assert [line["replicate"] for line in mine] == [0, 1, 2]
                assert len({line["train_loss"] for line in mine}) == 3

    def test_means_over_replicates_are_shown(self, three):
        assert "means of 3 replicates" in three.result.out
        assert "±" in three.result.out
        assert "±" in References((three.path / "report.html").read_text()).text

    @pytest.mark.slow
    def test_numbers_do_not_depend_on_the_devices(self, process, three, tmp_path):
        out = tmp_path / "run"
        arguments = *SMALL, *DIGITS, "--epochs", 2, "--replicates", 3, "--out", out
        running = process(*arguments, XLA_FLAGS="--xla_force_host_platform_device_count=4")
        stdout, stderr = running.communicate(timeout=120)
        assert (running.returncode, stderr) == (0, "")
        config = rundir.read_config(out)
        assert config["device_count"] == 4
        assert config["mesh"] == {"replicate": 2, "data": 1}
        assert lines_of(out) == lines_of(three.path)
        assert "\x1b" not in stdout
        assert "After 2 epochs" in stdout


class Recorder(nn.Module):
    """Its statistics remember which examples came when, and nothing else."""

    @nn.compact
    def __call__(self, x, *, train):
        seen = self.variable("batch_stats", "seen", jnp.zeros, x.shape[1:])
        if train and not self.is_initializing():
            seen.value = 0.5 * seen.value + x.sum(axis=0)
        return nn.Dense(10)(x)


@pytest.fixture(scope="module")
def seen() -> dict[str, np.ndarray]:
    """What each arm's recorder remembers of three epochs, `{arm: [epochs, R, N]}`."""
    examples = Batch(jnp.eye(12), jnp.arange(12, dtype=jnp.int32) % 10)
    arms = tuple(Arm(name, Recorder(), optax.sgd(0.1)) for name in ARMS)
    mesh = devices.make_mesh(1)
    keys = paired.replicate_keys(0, 2)
    placements = [Placement((arm,), mesh) for arm in arms]
    trainer = Trainer(placements, keys, examples, examples, batch_size=4)
    epochs = trainer.epochs(trainer.initial_states(), range(1, 4))
    seen = [
        {arm: np.array(epoch.states[arm].batch_stats["seen"]) for arm in ARMS} for epoch in epochs
    ]
    return {arm: np.stack([one[arm] for one in seen]) for arm in ARMS}


class TestArms:
    def test_see_the_same_batches_in_the_same_order(self, seen):
        np.testing.assert_array_equal(seen["bn"], seen["no_bn"])

    def test_see_every_example_once_per_epoch(self, seen):
        steps = np.sort(seen["bn"][0], axis=-1)
        np.testing.assert_array_equal(steps, [[0.25] * 4 + [0.5] * 4 + [1.0] * 4] * 2)

    def test_order_differs_between_epochs_and_replicates(self, seen):
        in_epoch = seen["bn"] - np.concatenate([np.zeros((1, 2, 12)), seen["bn"][:-1] / 8])
        orders = {tuple(order) for order in in_epoch.reshape(-1, 12).tolist()}
        assert len(orders) == 6


@pytest.fixture(scope="module")
def own(cache_home, tmp_path_factory) -> Job:
    """A run on data of one's own, named by a path relative to the working directory."""
    home = tmp_path_factory.mktemp("own")
    write_idx(home / "images", *noise(40, 12))
    with contextlib.chdir(home):
        arguments = "--dataset", "mnist", "--data-dir", "images", "--batch-size", 20
        return Job(home / "run", call(*SMALL, *arguments, "--epochs", 1, "--out", home / "run"))


def no_network(*_) -> None:
    raise DownloadError("there is no network")


class TestData:
    def test_auto_falls_back_to_digits_and_says_so(self, halfway, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(download, "fetch", no_network)
        result = call(*SMALL, "--epochs", 1)
        assert result.status == 0
        assert "NOTE: mnist cannot be downloaded: there is no network" in result.out
        (path,) = (tmp_path / "runs").iterdir()
        assert re.fullmatch(r"deep10-digits-\d{8}-\d{6}", path.name)
        assert "MNIST could not be had" in References((path / "report.html").read_text()).text
        config = rundir.read_config(path)
        assert config["dataset"]["name"] == config["experiment"]["dataset"] == "digits"
        assert lines_of(path) == lines_of(halfway.path)

    def test_named_dataset_does_not_fall_back(self, tmp_path, monkeypatch):
        monkeypatch.setattr(download, "fetch", no_network)
        result = call(*SMALL, "--dataset", "kmnist", "--out", tmp_path / "run")
        assert result.status == 2
        assert "kmnist cannot be downloaded: there is no network" in plain(result.err)
        assert not (tmp_path / "run").exists()

    def test_own_files(self, own):
        assert own.result.status == 0
        config = rundir.read_config(own.path)
        loaded = data.load("mnist", own.path.parent / "images")
        assert config["dataset"]["name"] == "mnist"
        assert config["dataset"]["sha256"] == data.fingerprint(loaded)
        for line in Run(own.path).lines:
            assert line["test_accuracy"] * 12 == pytest.approx(round(line["test_accuracy"] * 12))

    def test_resuming_finds_them_from_another_working_directory(self, own, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        path = copy(own, tmp_path / "run")
        assert call("--resume", path, "--epochs", 2).status == 0
        assert lines_of(path)[:2] == lines_of(own.path)
        assert len(lines_of(path)) == 4

    def test_resuming_refuses_changed_data(self, own, tmp_path):
        path = copy(own, tmp_path / "run")
        changed = write_idx(tmp_path / "images", *noise(40, 12, seed=1))
        before = contents(path)
        result = call("--resume", path, "--epochs", 2, "--data-dir", changed)
        assert result.status == 2
        assert "was trained on other data" in plain(result.err)
        assert contents(path) == before

    def test_variable_names_the_directory(self, tmp_path, monkeypatch):
        monkeypatch.setenv("BNJAX_DATA_DIR", str(tmp_path / "nowhere"))
        result = call(*SMALL, "--out", tmp_path / "run")
        assert result.status == 2
        assert "nowhere: no such directory" in plain(result.err)
        assert not (tmp_path / "run").exists()


class TestMistakes:
    @pytest.fixture(autouse=True)
    def working_directory(self, tmp_path, monkeypatch) -> Path:
        monkeypatch.chdir(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--learning-rate 0", "learning_rate is 0.0: expected a positive finite number"),
            ("--learning-rate -0.1", "learning_rate is -0.1: expected a positive finite number"),
            ("--learning-rate nan", "learning_rate is nan"),
            ("--learning-rate inf", "learning_rate is inf"),
            ("--learning-rate fast", "--learning-rate: could not convert string to float: 'fast'"),
            ("--epochs 0", "epochs is 0: expected at least 1"),
            ("--epochs -3", "epochs is -3: expected at least 1"),
            ("--epochs 1.5", "--epochs: invalid literal for int() with base 10: '1.5'"),
            ("--batch-size 0", "batch_size is 0: expected at least 2"),
            ("--batch-size 1", "batch_size is 1: expected at least 2"),
            ("--batch-size 1438", "batch_size is 1438: digits has 1437 training examples"),
            ("--batch-size 4 --no-drop-last", "the last batch of 1437 training examples would"),
            ("--batch-size 359 --no-drop-last", "hold one example, which cannot be normalized"),
            ("--preset deep10 --batch-size 359", "choose another batch size or --drop-last"),
            ("--replicates 0", "replicates is 0: expected at least 1"),
            ("--seed -1", "seed is -1: expected 0 to 4294967295"),
            ("--seed 4294967296", "seed is 4294967296: expected 0 to 4294967295"),
            ("--hidden-sizes 32 0", "hidden_sizes is 0: expected at least 1"),
            ("--hidden-sizes", "hidden_sizes is empty"),
            ("--hidden-sizes 32 wide", "--hidden-sizes: Could not find valid parse"),
            ("--num-classes 9", "num_classes is 9: expected at least 10"),
            ("--preset deep11", "unknown preset 'deep11': did you mean 'deep10'?"),
            ("--preset=deep11", "unknown preset 'deep11': did you mean 'deep10'?"),
            ("--preset", "Missing value for argument '--preset'"),
            ("--dataset fashion-mnist", "did you mean 'fashion_mnist'?"),
            ("--activation rleu", "unknown activation 'rleu': did you mean 'relu'?"),
            ("--bn-init xavier_unifrom", "did you mean 'xavier_uniform'?"),
            ("--no-bn-init he_norm", "did you mean 'he_normal'?"),
            ("--bn-init normal(0)", "standard deviation must be positive and finite"),
            ("--no-bn-init normal(x)", "normal(x): expected a number, as in normal(0.05)"),
            ("--epoch 3", "Unrecognized options: --epoch, 3"),
            ("leftover", "Unrecognized options: leftover"),
            ("--feature-digit 10", "feature_digit is 10: expected 0 to 9"),
            ("--feature-digit -1", "feature_digit is -1: expected 0 to 9"),
            ("--mesh replicate", "mesh 'replicate': expected each axis once as AXIS=SIZE"),
            (
                "--mesh replicate=0",
                "mesh 'replicate=0': expected each axis once as AXIS=SIZE with sizes from 1",
            ),
            ("--mesh replicate=two", "mesh 'replicate=two': expected each axis once as AXIS=SIZE"),
            ("--mesh replicates=2", "unknown mesh axis 'replicates': did you mean 'replicate'?"),
            ("--mesh data=2,replicate=999", "mesh replicate=999,data=2 needs 1998 devices, found"),
            ("--bn-statistics gloabl", "unknown bn_statistics 'gloabl': did you mean 'global'?"),
            ("--dataset mnist --data-dir nowhere", "nowhere: no such directory"),
            ("--dataset auto --data-dir nowhere", "nowhere: no such directory"),
            ("--dataset kmnist --data-dir .", "kmnist is not here"),
            ("--resume nowhere", "there is no directory nowhere"),
            ("--resume .", ". is not a run directory"),
            ("--resume", "Missing value for argument '--resume'"),
        ],
    )
    def test_settings(self, working_directory, arguments, message):
        dataset = () if "--dataset" in arguments else DIGITS
        result = call(*dataset, *arguments.split())
        assert result.status == 2
        assert message in plain(result.err)
        assert result.out == ""
        assert list(working_directory.iterdir()) == []

    def test_mesh_that_the_devices_do_not_fill(self, working_directory, monkeypatch):
        monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
        result = call(*SMALL, *DIGITS, "--mesh", "replicate=999")
        assert result.status == 2
        assert "mesh replicate=999,data=1 needs 999 devices, found" in plain(result.err)
        assert list(working_directory.iterdir()) == []

    @pytest.mark.parametrize(
        ("out", "message"),
        [
            ("full", "full is not empty"),
            ("full/file", "full/file is a file"),
            ("full/file/run", "full/file/run cannot be"),
            ("n" * 300, "File name too long"),
        ],
    )
    def test_place_that_is_taken(self, working_directory, out, message):
        (working_directory / "full").mkdir()
        (working_directory / "full" / "file").write_text("kept")
        result = call(*SMALL, *DIGITS, "--epochs", 1, "--out", out)
        assert result.status == 2
        assert message in plain(result.err)
        assert {name: text for name, (text, _) in contents(working_directory).items()} == {
            "full/file": b"kept"
        }

    @pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
    def test_place_that_is_forbidden(self, working_directory):
        (working_directory / "locked").mkdir(mode=0o555)
        result = call(*SMALL, *DIGITS, "--epochs", 1, "--out", "locked/run")
        assert result.status == 2
        assert "locked/run cannot be created: Permission denied" in plain(result.err)

    def test_mistake_in_a_process_of_its_own(self, process, working_directory):
        running = process("--epochs", 0)
        stdout, stderr = running.communicate(timeout=60)
        assert (running.returncode, stdout) == (2, "")
        assert "epochs is 0: expected at least 1" in plain(stderr)
        assert "Traceback" not in stderr
        assert list(working_directory.iterdir()) == []


class TestResume:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--seed 1", "cannot go on with other settings: seed was 0, now 1"),
            ("--learning-rate 0.1 --epochs 3", "learning_rate was 0.001, now 0.1"),
            ("--hidden-sizes 8 8", "hidden_sizes was (5,), now (8, 8)"),
            ("--preset lab10", "preset was deep10, now lab10"),
            ("--dataset mnist", "dataset was digits, now mnist"),
            ("--no-drop-last", "drop_last was True, now False"),
            ("--replicates 2 --seed 3", "replicates was 1, now 2, seed was 0, now 3"),
            ("--epochs 1", "was started for 2 epochs: epochs may only grow"),
            ("--epochs 0", "epochs is 0"),
            ("--out elsewhere", "--out and --resume exclude each other"),
        ],
    )
    def test_refuses_changes(self, finished, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        path = copy(finished, tmp_path / "run")
        before = contents(tmp_path)
        result = call("--resume", path, *arguments.split())
        assert result.status == 2
        assert message in plain(result.err)
        assert contents(tmp_path) == before

    @pytest.mark.parametrize(
        "text",
        ["", "{", "\xff", "{}", "[]", "7", '{"experiment": {}, "execution": {}, "dataset": {}}'],
    )
    def test_refuses_a_damaged_configuration(self, halfway, tmp_path, text):
        path = copy(halfway, tmp_path / "run")
        (path / "config.json").write_text(text, encoding="latin-1")
        before = contents(path)
        result = call("--resume", path)
        assert result.status == 2
        assert result.err.startswith("error: ")
        assert contents(path) == before

    @pytest.mark.parametrize(
        ("section", "name", "value"),
        [
            ("experiment", "epochs", "two"),
            ("experiment", "epochs", 0),
            ("experiment", "hidden_sizes", 5),
            ("experiment", "preset", "deep11"),
            ("experiment", "momentum", 0.9),
            ("execution", "feature_digit", 10),
            ("execution", "feature_digit", None),
            ("dataset", "sha256", None),
        ],
    )
    def test_refuses_damaged_settings(self, halfway, tmp_path, section, name, value):
        path = copy(halfway, tmp_path / "run")
        edit_config(path, lambda config: config[section].update({name: value}))
        before = contents(path)
        result = call("--resume", path, "--epochs", 2)
        assert result.status == 2
        assert "error: " in result.err or "Error parsing" in result.err
        assert contents(path) == before

    def test_refuses_checkpoints_of_another_network(self, halfway, tmp_path):
        path = copy(halfway, tmp_path / "run")
        edit_config(path, lambda config: config["experiment"].update(hidden_sizes=[6]))
        result = call("--resume", path, "--epochs", 2)
        assert result.status == 2
        assert "of other settings or of another version of the networks" in plain(result.err)
        assert lines_of(path) == lines_of(halfway.path)

    def test_goes_on_as_if_never_stopped(self, finished, halfway, tmp_path):
        path = copy(halfway, tmp_path / "moved")
        result = call("--resume", path, "--epochs", 2, pictures=True)
        assert result.status == 0
        assert re.findall(r"^(\d+/\d+) ", result.out, re.MULTILINE) == ["2/2"]
        assert lines_of(path) == lines_of(finished.path)
        for name in ("summary.json", "curves.svg", "features.png"):
            assert (path / name).read_bytes() == (finished.path / name).read_bytes()

    def test_keeps_where_the_first_epochs_came_from(self, halfway, tmp_path):
        path = shutil.copytree(halfway.path, tmp_path / "run")
        before = rundir.read_config(path)
        result = call("--resume", path, "--epochs", 2)
        after = rundir.read_config(path)
        assert "going on after epoch 1" in result.out
        assert len(after["resumed"]) == 1
        assert after["resumed"][0]["versions"] == before["versions"]
        unchanged = set(before) - {"experiment"}
        assert {name: after[name] for name in unchanged} == {
            name: before[name] for name in unchanged
        }

    def test_refuses_another_test_digit(self, halfway):
        result = call("--resume", halfway.path, "--epochs", 2, "--feature-digit", 3)
        assert result.status == 2
        assert "records another test digit" in plain(result.err)

    def test_of_a_finished_run_changes_nothing(self, finished, tmp_path):
        path = copy(finished, tmp_path / "run")
        before = contents(path)
        result = call("--resume", path)
        assert result.status == 0
        assert f"{path} is finished: 2 epochs" in plain(result.out)
        assert contents(path) == before

    def test_of_a_finished_run_needs_no_data(self, finished, monkeypatch):
        monkeypatch.setattr(data, "load", None)
        result = call("--resume", finished.path)
        assert (result.status, result.err) == (0, "")
        assert "is finished: 2 epochs" in plain(result.out)

    def test_a_state_that_is_not_there_is_missed_in_a_sentence(self, finished, tmp_path):
        path = copy(finished, tmp_path / "run")
        shutil.rmtree(path / "checkpoints")
        with pytest.raises(CheckpointError, match=r"epoch-002\.safetensors is not there: go on"):
            Run(path).variables("bn")

    def test_drops_lines_beyond_the_checkpoint_and_a_torn_one(self, finished, halfway, tmp_path):
        path = copy(halfway, tmp_path / "run")
        stray = [{**line, "epoch": 2, "test_loss": 7.0} for line in Run(path).lines]
        metrics.append(path, stray)
        with (path / "metrics.jsonl").open("a") as file:
            file.write('{"epoch": 3, "arm": "b')
        assert call("--resume", path, "--epochs", 2).status == 0
        assert lines_of(path) == lines_of(finished.path)

    def test_keeps_saying_that_digits_took_the_place_of_mnist(self, halfway, tmp_path):
        path = copy(halfway, tmp_path / "run")
        edit_config(path, lambda config: config["dataset"].update(requested="auto"))
        assert call("--resume", path, "--epochs", 2).status == 0
        assert "MNIST could not be had" in References((path / "report.html").read_text()).text


@pytest.fixture(scope="module")
def diverged(cache_home, tmp_path_factory) -> Job:
    path = tmp_path_factory.mktemp("diverged") / "run"
    arguments = "--learning-rate", "1e30", "--epochs", 1, "--out", path
    return Job(path, call(*SMALL, *DIGITS, *arguments))


class TestDivergence:
    def test_of_every_replicate_ends_with_3(self, diverged):
        assert diverged.result.status == 3
        for arm in ARMS:
            assert f"error: every replicate of {arm} has diverged" in diverged.result.err

    def test_is_recorded_as_null(self, diverged):
        text = (diverged.path / "metrics.jsonl").read_text()
        assert not re.search("NaN|Infinity", text)
        for line in Run(diverged.path).lines:
            assert [line[name] for name in ("train_cost", "train_loss", "test_loss")] == [None] * 3
            assert line["test_accuracy"] is not None

    def test_is_marked_with_step_and_layer(self, diverged):
        marks = divergences.read(diverged.path)
        assert [(mark["arm"], mark["replicate"], mark["epoch"]) for mark in marks] == [
            (arm, 0, 1) for arm in ARMS
        ]
        for mark in marks:
            assert mark["step"] > 1
            assert re.match(r"(Dense|BatchNorm)_\d+$", mark["layer"])
            network = LABELS[mark["arm"]]
            told = f"{network}, replicate 0 diverged in step {mark['step']} of epoch 1"
            assert f"NOTE: {told}; not finite from {mark['layer']} on" in diverged.result.out
            assert told in References((diverged.path / "report.html").read_text()).text
        summary = json.loads((diverged.path / "summary.json").read_text())
        assert summary["divergences"] == marks

    @pytest.mark.slow
    def test_that_only_the_evaluation_meets_is_marked_without_a_step(self, tmp_path):
        path = tmp_path / "run"
        full_batch = "--batch-size", 1437, "--learning-rate", 1e38, "--epochs", 1
        result = call(*SMALL, *DIGITS, *full_batch, "--out", path)
        assert result.status == 3
        marks = divergences.read(path)
        assert [(mark["arm"], mark["epoch"], mark["step"]) for mark in marks] == [
            (arm, 1, None) for arm in ARMS
        ]
        for mark in marks:
            assert re.match(r"(Dense|BatchNorm)_\d+$", mark["layer"])
        assert "with BN, replicate 0 diverged in the evaluation after epoch 1; not" in result.out

    def test_marks_of_epochs_to_come_are_dropped(self, halfway, tmp_path):
        path = copy(halfway, tmp_path / "run")
        marks = [
            {"arm": "bn", "replicate": 0, "epoch": e, "step": 1, "layer": None} for e in (1, 2)
        ]
        rundir.write_json(path / "divergences.json", marks)
        assert call("--resume", path, "--epochs", 2).status == 0
        assert divergences.read(path) == marks[:1]

    def test_is_on_the_page_only_where_it_was(self, finished, diverged):
        pages = [(run.path / "report.html").read_text() for run in (finished, diverged)]
        assert ["Replicates that diverged" in page for page in pages] == [False, True]

    def test_is_reported(self, diverged):
        summary = json.loads((diverged.path / "summary.json").read_text())
        assert summary["arms"]["bn"]["train_cost"] == summarize([])._asdict()
        assert "not finite" in References((diverged.path / "report.html").read_text()).text
        assert "not finite" in diverged.result.out

    @pytest.mark.parametrize(("replicates", "status"), [({1}, 0), ({0, 1, 2}, 3)])
    def test_counts_only_where_all_replicates_did(self, three, tmp_path, replicates, status):
        path = copy(three, tmp_path / "run")
        (path / "summary.json").unlink()
        lines = Run(path).lines
        for line in lines:
            if line["arm"] == "no_bn" and line["replicate"] in replicates:
                line.update(dict.fromkeys(COSTS))
        (path / "metrics.jsonl").unlink()
        metrics.append(path, lines)
        result = call("--resume", path)
        assert result.status == status
        assert ("every replicate of no_bn has diverged" in result.err) == (status == 3)
        summary = json.loads((path / "summary.json").read_text())
        assert summary["arms"]["no_bn"]["test_loss"]["n"] == 3 - len(replicates)
        assert summary["differences"]["bn"]["test_loss"]["n"] == 3 - len(replicates)


class TestStopping:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
    )
    def test_signal(self, process, finished, tmp_path, number, status):
        epochs = 30
        running = process(*SMALL, *DIGITS, "--epochs", epochs, "--out", "run")
        file = tmp_path / "run" / "metrics.jsonl"
        while running.poll() is None and not (file.exists() and file.read_bytes()):
            time.sleep(0.01)
        running.send_signal(number)
        _, stderr = running.communicate(timeout=60)
        assert running.returncode == status
        assert stderr == "stopped; go on with: python -m experiments.mnist_bn --resume run\n"
        assert len(Run(tmp_path / "run").lines) < 2 * epochs
        assert call("--resume", tmp_path / "run").status == 0
        assert len(lines_of(tmp_path / "run")) == 2 * epochs
        assert lines_of(tmp_path / "run")[:4] == lines_of(finished.path)

    @pytest.mark.parametrize(
        ("module", "name", "calls"),
        [
            (Trainer, "initial_states", 1),
            (metrics, "append", 2),
            (report, "redraw", 1),
        ],
        ids=lambda value: getattr(value, "__name__", value),
    )
    def test_anywhere_loses_nothing(self, finished, tmp_path, monkeypatch, module, name, calls):
        original, done = getattr(module, name), []

        def interrupted(*arguments, **settings):
            result = original(*arguments, **settings)
            done.append(result)
            if len(done) == calls:
                raise KeyboardInterrupt
            return result

        path = tmp_path / "run"
        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupted)
            assert call(*SMALL, *DIGITS, "--epochs", 2, "--out", path).status == 130
        assert call("--resume", path).status == 0
        assert lines_of(path) == lines_of(finished.path)
        assert {file.name for file in path.rglob("*.*")} == {
            file.name for file in finished.path.rglob("*.*")
        }

    @pytest.mark.parametrize(
        ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
    )
    def test_signal_is_not_lost_in_a_callback(
        self, tmp_path, monkeypatch, python_sigint, number, status
    ):
        """Python drops an exception that leaves a callback, as JAX's of garbage collection."""
        append = metrics.append

        def signalled(*arguments):
            append(*arguments)
            with contextlib.suppress(BaseException):
                signal.raise_signal(number)

        monkeypatch.setattr(metrics, "append", signalled)
        assert call(*SMALL, *DIGITS, "--epochs", 2, "--out", tmp_path / "run").status == status
        assert not (tmp_path / "run" / "summary.json").exists()

    def test_hint_can_be_pasted(self, tmp_path, monkeypatch):
        def interrupted(*_, **settings):
            raise KeyboardInterrupt

        monkeypatch.setattr(Trainer, "initial_states", interrupted)
        result = call(*SMALL, *DIGITS, "--out", tmp_path / "my run")
        assert shlex.split(result.err)[-2:] == ["--resume", str(tmp_path / "my run")]

    def test_before_anything_is_written_gives_no_hint(self, tmp_path, monkeypatch):
        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(data, "load", interrupted)
        result = call(*SMALL, *DIGITS, "--out", tmp_path / "run")
        assert (result.status, result.err) == (130, "stopped\n")
        assert list(tmp_path.iterdir()) == []

    def test_sigterm_means_again_what_it_meant_before(self, tmp_path):
        before = signal.getsignal(signal.SIGTERM)
        call("--epochs", 0)
        assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture(scope="module")
def help_page() -> Result:
    return call("--help")


class TestHelp:
    def test_success(self, help_page):
        assert (help_page.status, help_page.err) == (0, "")

    @pytest.mark.parametrize(
        "name", [f.name for f in (*dataclasses.fields(Experiment), *dataclasses.fields(Execution))]
    )
    def test_explains_every_flag(self, help_page, name):
        flag = f"--{name.replace('_', '-')}"
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", help_page.out)

    @pytest.mark.parametrize("status", [0, 2, 3, 130, 143])
    def test_explains_exit_statuses(self, help_page, status):
        told = plain(help_page.out).split("Exit status:")[1]
        assert re.search(rf"\b{status} \w+", told)

    def test_shows_the_defaults_of_the_preset(self):
        told = plain(call("--preset", "lab10", "--help").out)
        assert re.search(r"--batch-size INT .*?\(default: 32\)", told)


@pytest.mark.parametrize("opened", [True, False])
def test_opens_the_report_where_that_is_wanted(opened, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(webbrowser, "open", seen.append)
    flags = ("--epochs", 1, "--out", tmp_path / "run", "--open" if opened else "--no-open")
    assert call(*DIGITS, *SMALL, *flags).status == 0
    assert seen == [(tmp_path / "run" / "report.html").as_uri()] * opened
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["execution"]["open"] is False
    assert call("--resume", tmp_path / "run", *["--open"] * opened).status == 0
    assert len(seen) == 2 * opened

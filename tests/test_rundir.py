"""What a run leaves behind: its directory, configuration, metrics and summary."""

import json
import math
import re

import numpy as np
import pytest
from factories import config, line, make_curves, make_lines, make_summary

from bnjax import statistics
from bnjax.errors import CheckpointError
from experiments.lab import metrics, rundir
from experiments.lab.presets import LAB10

TWO = ("bn", "no_bn")


class TestPlace:
    def test_default(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert re.fullmatch(
            r"runs/lab10-mnist-\d{8}-\d{6}", rundir.default_path("lab10", "mnist").as_posix()
        )

    def test_runs_of_the_same_second_are_numbered(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(rundir.time, "strftime", lambda _: "now")
        names = []
        for _ in range(3):
            path = rundir.default_path("lab10", "mnist")
            path.mkdir(parents=True)
            names.append(path.name)
        assert names == ["lab10-mnist-now", "lab10-mnist-now-2", "lab10-mnist-now-3"]

    def test_free(self, tmp_path):
        rundir.check_free(tmp_path)
        rundir.check_free(tmp_path / "new" / "run")

    def test_full(self, tmp_path):
        (tmp_path / "something").touch()
        with pytest.raises(ValueError, match="is not empty"):
            rundir.check_free(tmp_path)

    def test_file(self, tmp_path):
        (tmp_path / "run").touch()
        with pytest.raises(ValueError, match="is a file"):
            rundir.check_free(tmp_path / "run")

    @pytest.mark.parametrize("existing", [False, True])
    def test_appears_with_its_configuration(self, tmp_path, existing):
        path = tmp_path / "new" / "run"
        if existing:
            path.mkdir(parents=True)
        rundir.create(path, {"a": 1})
        assert json.loads((path / "config.json").read_text()) == {"a": 1}
        assert {file.name for file in path.iterdir()} == {"config.json"}
        assert list(path.parent.iterdir()) == [path]

    def test_leaves_nothing_when_it_cannot_appear(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="cannot be"):
            rundir.create(tmp_path / "file" / "run", {})
        assert [file.name for file in tmp_path.iterdir()] == ["file"]


class TestConfiguration:
    def test_is_read_as_written(self, tmp_path):
        rundir.create(tmp_path / "run", config(LAB10))
        assert rundir.read_config(tmp_path / "run") == json.loads(json.dumps(config(LAB10)))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (None, "is not a run directory"),
            ("", "is damaged"),
            ('{"experiment": ', "is damaged"),
            ('{"experiment": {}}', "is damaged: it lacks"),
            ("[]", "is damaged: it lacks"),
            ("7", "config.json"),
        ],
    )
    def test_says_what_is_wrong(self, tmp_path, text, message):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            rundir.read_config(tmp_path)

    def test_provenance(self):
        versions = rundir.provenance()["versions"]
        assert {"python", "bnjax", "jax", "flax", "optax"} <= set(versions)
        assert versions["numpy"] == np.__version__


class TestMetrics:
    def test_are_read_as_appended(self, tmp_path):
        assert metrics.read(tmp_path, TWO, 2) == []
        lines = make_lines(epochs=2, replicates=2)
        metrics.append(tmp_path, lines[:4])
        metrics.append(tmp_path, lines[4:])
        assert metrics.read(tmp_path, TWO, 2) == lines

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_becomes_null(self, tmp_path, value):
        metrics.append(tmp_path, [line(1, "bn", train_cost=value)])
        assert '"train_cost": null' in (tmp_path / "metrics.jsonl").read_text()
        assert metrics.read(tmp_path, ["bn"], 1) == [line(1, "bn", train_cost=None)]

    def test_fewer_epochs_replace_them(self, tmp_path):
        lines = make_lines(epochs=2, replicates=2)
        metrics.append(tmp_path, lines)
        metrics.write(tmp_path, lines[:4])
        assert metrics.read(tmp_path, TWO, 2) == lines[:4]

    @pytest.mark.parametrize("torn", ['{"epoch": 1, "ar', '{"epoch": 1}'])
    def test_a_torn_line_is_not_read(self, tmp_path, torn):
        lines = make_lines(epochs=1, replicates=1)
        metrics.append(tmp_path, lines)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(torn)
        assert metrics.read(tmp_path, TWO, 1) == lines

    def test_none_are_read_of_a_run_that_begins(self, tmp_path):
        assert metrics.read(tmp_path, TWO, 1) == []

    def test_lines_of_another_order_are_refused(self, tmp_path):
        metrics.append(tmp_path, make_lines(epochs=1, replicates=1))
        with pytest.raises(CheckpointError, match="epoch 1, replicate 0, arm no_bn"):
            metrics.read(tmp_path, TWO[::-1], 1)

    @pytest.mark.parametrize(("name", "value"), [("epoch", True), ("replicate", 0.0)])
    def test_a_number_of_another_type_is_refused(self, tmp_path, name, value):
        (first, *rest) = make_lines(epochs=1, replicates=1)
        metrics.append(tmp_path, [{**first, name: value}, *rest])
        with pytest.raises(CheckpointError, match="line 1 does not hold the metrics of epoch 1"):
            metrics.read(tmp_path, TWO, 1)

    def test_as_arrays(self):
        lines = make_lines(epochs=3, replicates=2)
        lines[-1]["test_loss"] = None
        by_arm = metrics.curves([*lines, line(4, "bn")], TWO)
        assert by_arm["bn"]["test_loss"].shape == (3, 2)
        assert by_arm["no_bn"]["train_cost"][1, 0] == lines[5]["train_cost"]
        assert np.isnan(by_arm["no_bn"]["test_loss"]).tolist() == [[False] * 2] * 2 + [
            [False, True]
        ]


class TestSummary:
    @pytest.fixture
    def summary(self) -> dict:
        losses = {"bn": [1.0, 2.0, 4.0], "no_bn": [0.5, None, 1.5]}
        first = [line(1, arm, r) for r in range(3) for arm in TWO]
        last = [line(2, arm, r, test_loss=losses[arm][r]) for r in range(3) for arm in TWO]
        return metrics.summarize(metrics.curves([*first, *last], TWO), "no_bn")

    def test_counts(self, summary):
        assert (summary["epochs"], summary["replicates"]) == (2, 3)

    def test_mean_and_sd_are_over_finite_replicates(self, summary):
        found = {arm: summary["arms"][arm]["test_loss"] for arm in TWO}
        for arm, values in {"bn": [1.0, 2.0, 4.0], "no_bn": [0.5, 1.5]}.items():
            assert found[arm] == statistics.summarize(values)._asdict()

    def test_differences_are_paired(self, summary):
        assert (summary["reference"], list(summary["differences"])) == ("no_bn", ["bn"])
        found = summary["differences"]["bn"]["test_loss"]
        assert found == statistics.paired_difference([0.5, 2.5], [0, 0])._asdict() | {"wins": 0}

    def test_each_arm_is_held_against_the_reference(self):
        by_arm = make_curves(2, 3, arms=("bn", "no_bn", "layer_norm"))
        differences = metrics.summarize(by_arm, "bn")["differences"]
        assert list(differences) == ["no_bn", "layer_norm"]
        for arm, found in differences.items():
            minus = by_arm[arm]["test_loss"][-1] - by_arm["bn"]["test_loss"][-1]
            assert found["test_loss"]["mean"] == pytest.approx(minus.mean())

    @pytest.mark.parametrize("metric", metrics.METRICS)
    def test_lower_losses_and_higher_accuracies_win(self, metric):
        values = {"bn": 0.1, "no_bn": 0.0}
        lines = [line(1, arm, r, **{metric: values[arm]}) for r in range(2) for arm in TWO]
        summary = metrics.summarize(metrics.curves(lines, TWO), "no_bn")
        wins = summary["differences"]["bn"][metric]["wins"]
        assert wins == (2 if metric.endswith("accuracy") else 0)

    def test_one_replicate_has_no_sd(self):
        assert make_summary()["arms"]["bn"]["train_cost"]["sd"] is None

    def test_is_the_last_file_of_a_finished_run(self, tmp_path):
        assert not rundir.is_finished(tmp_path, 2)
        rundir.write_json(tmp_path / "summary.json", make_summary(epochs=2))
        assert rundir.is_finished(tmp_path, 2)
        assert not rundir.is_finished(tmp_path, 3)

    @pytest.mark.parametrize("text", ["", "{", "{}"])
    def test_damaged_is_not_finished(self, tmp_path, text):
        (tmp_path / "summary.json").write_text(text)
        assert not rundir.is_finished(tmp_path, 2)


class TestFiles:
    def test_json_that_cannot_be_written_leaves_the_former(self, tmp_path):
        rundir.write_json(tmp_path / "a.json", {"a": 1})
        with pytest.raises(ValueError, match="not JSON compliant"):
            rundir.write_json(tmp_path / "a.json", {"a": math.nan})
        assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}

    def test_nothing_partial_remains(self, tmp_path):
        rundir.write_arrays(tmp_path / "a.npz", {"a": np.zeros(3)})
        rundir.write_json(tmp_path / "a.json", {})
        assert {file.name for file in tmp_path.iterdir()} == {"a.npz", "a.json"}


def test_a_diverged_replicate_counts_in_no_metric():
    lines = [line(1, arm, replicate=k) for k in range(3) for arm in TWO]
    lines[2] |= {"train_cost": None, "test_loss": None, "test_accuracy": 0.1}
    summary = metrics.summarize(metrics.curves(lines, TWO), "no_bn")["arms"]["bn"]
    assert {metric: summary[metric]["n"] for metric in summary} == dict.fromkeys(metrics.METRICS, 2)

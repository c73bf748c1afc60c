"""What a run leaves behind and shows: files, lines on the terminal, pictures, the page."""

import io
import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from factories import config, line, make_lines
from PIL import Image
from rich.console import Console

from bnjax import statistics
from experiments.lab import console, metrics, rundir
from experiments.lab.presets import Boostcourse, Lab10
from experiments.report import figures


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
        rundir.create(tmp_path / "run", config(Lab10()))
        assert rundir.read_config(tmp_path / "run") == json.loads(json.dumps(config(Lab10())))

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
        assert metrics.read(tmp_path) == []
        lines = make_lines(epochs=2, replicates=2)
        metrics.append(tmp_path, lines[:4])
        metrics.append(tmp_path, lines[4:])
        assert metrics.read(tmp_path) == lines

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_becomes_null(self, tmp_path, value):
        metrics.append(tmp_path, [line(1, "bn", train_cost=value)])
        assert '"train_cost": null' in (tmp_path / "metrics.jsonl").read_text()
        assert metrics.read(tmp_path) == [line(1, "bn", train_cost=None)]

    @pytest.mark.parametrize("epochs", [0, 1, 2, 3])
    def test_truncation_keeps_the_first_epochs(self, tmp_path, epochs):
        lines = make_lines(epochs=2, replicates=2)
        metrics.append(tmp_path, lines)
        metrics.truncate(tmp_path, epochs)
        assert metrics.read(tmp_path) == lines[: 4 * epochs]

    @pytest.mark.parametrize("torn", ['{"epoch": 1, "ar', '{"epoch": 1}'])
    def test_truncation_drops_a_torn_line(self, tmp_path, torn):
        lines = make_lines(epochs=1, replicates=1)
        metrics.append(tmp_path, lines)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(torn)
        metrics.truncate(tmp_path, 5)
        assert metrics.read(tmp_path) == lines

    def test_truncation_of_nothing(self, tmp_path):
        metrics.truncate(tmp_path, 1)
        assert metrics.read(tmp_path) == []

    def test_as_arrays(self):
        lines = make_lines(epochs=3, replicates=2)
        lines[-1]["test_loss"] = None
        by_arm = metrics.curves(reversed(lines))
        assert by_arm["bn"]["test_loss"].shape == (3, 2)
        assert by_arm["no_bn"]["train_cost"][1, 0] == lines[5]["train_cost"]
        assert np.isnan(by_arm["no_bn"]["test_loss"]).tolist() == [[False] * 2] * 2 + [
            [False, True]
        ]


class TestSummary:
    @pytest.fixture
    def summary(self) -> dict:
        losses = {"bn": [1.0, 2.0, 4.0], "no_bn": [0.5, None, 1.5]}
        first = [line(1, arm, r) for arm in metrics.ARMS for r in range(3)]
        last = [line(2, a, r, test_loss=x) for a in metrics.ARMS for r, x in enumerate(losses[a])]
        return metrics.summarize([*first, *last])

    def test_counts(self, summary):
        assert (summary["epochs"], summary["replicates"]) == (2, 3)

    def test_mean_and_sd_are_over_finite_replicates(self, summary):
        found = {arm: summary["arms"][arm]["test_loss"] for arm in metrics.ARMS}
        for arm, values in {"bn": [1.0, 2.0, 4.0], "no_bn": [0.5, 1.5]}.items():
            assert found[arm] == statistics.summarize(values)._asdict()

    def test_differences_are_paired(self, summary):
        found = summary["paired_differences"]["test_loss"]
        assert found == statistics.paired_difference([0.5, 2.5], [0, 0])._asdict() | {"favour": 0}

    @pytest.mark.parametrize("metric", metrics.METRICS)
    def test_lower_losses_and_higher_accuracies_favour_normalization(self, metric):
        values = {"bn": 0.1, "no_bn": 0.0}
        lines = [line(1, arm, r, **{metric: values[arm]}) for arm in metrics.ARMS for r in range(2)]
        difference = metrics.summarize(lines)["paired_differences"][metric]
        assert difference["favour"] == (2 if metric.endswith("accuracy") else 0)

    def test_one_replicate_has_no_sd(self):
        summary = metrics.summarize(make_lines(epochs=1, replicates=1))
        assert summary["arms"]["bn"]["train_cost"]["sd"] is None

    def test_is_the_last_file_of_a_finished_run(self, tmp_path):
        assert not rundir.is_finished(tmp_path, 2)
        rundir.write_json(tmp_path / "summary.json", metrics.summarize(make_lines(2, 1)))
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

    def test_arrays_are_read_as_written(self, tmp_path):
        arrays = {"bn/features_1": np.arange(6.0).reshape(1, 2, 3), "label": np.int32(3)}
        rundir.write_arrays(tmp_path / "a.npz", arrays)
        loaded = figures.read_arrays(tmp_path / "a.npz")
        assert set(loaded) == set(arrays)
        np.testing.assert_array_equal(loaded["bn/features_1"], arrays["bn/features_1"])

    def test_nothing_partial_remains(self, tmp_path):
        rundir.write_arrays(tmp_path / "a.npz", {"a": np.zeros(3)})
        rundir.write_json(tmp_path / "a.json", {})
        assert {file.name for file in tmp_path.iterdir()} == {"a.npz", "a.json"}


class TestConsole:
    @pytest.mark.parametrize(
        ("metric", "mean", "sd", "difference", "text"),
        [
            ("test_loss", 0.12344, None, False, "0.1234"),
            ("test_loss", 0.12344, 0.00567, False, "0.1234 ± 0.0057"),
            ("test_loss", 0.12344, None, True, "+0.1234"),
            ("test_loss", -0.5, 0.25, True, "-0.5000 ± 0.2500"),
            ("test_accuracy", 0.97831, None, False, "97.83 %"),
            ("test_accuracy", 0.97831, 0.0012, False, "97.83 ± 0.12 %"),
            ("train_accuracy", -0.0123, 0.001, True, "-1.23 ± 0.10 points"),
            ("train_cost", None, None, False, "not finite"),
            ("train_cost", None, None, True, "not finite"),
        ],
    )
    def test_format_summary(self, metric, mean, sd, difference, text):
        summary = {"mean": mean, "sd": sd, "n": 2}
        assert console.format_summary(metric, summary, difference) == text

    def test_closing_table(self):
        summary = metrics.summarize(make_lines(epochs=3, replicates=2))
        text = render(lambda to: to.print(console.closing_table(summary)))
        assert "After 3 epochs, 2 replicates" in text
        for metric in metrics.METRICS:
            row = next(row for row in text.splitlines() if metric.replace("_", " ") in row)
            for arm in metrics.ARMS:
                assert console.format_summary(metric, summary["arms"][arm][metric]) in row
            last = [row for row in text.splitlines() if metric.replace("_", " ") in row][-1]
            difference = summary["paired_differences"][metric]
            assert all(told in last for told in console.format_certainty(metric, difference))

    def test_one_replicate_has_no_interval_and_says_so(self):
        summary = metrics.summarize(make_lines(epochs=1, replicates=1))
        text = render(lambda to: to.print(console.closing_table(summary)))
        assert "no interval can be given" in text
        assert "95 % interval" not in text

    @pytest.mark.parametrize(
        ("metric", "difference", "told"),
        [
            ("test_loss", ((-0.25, 0.125), 3, 4, 0.625), ("-0.2500 to +0.1250", "3 of 4", "0.62")),
            ("test_accuracy", ((0.01, 0.02), 8, 8, 0.0078), ("+1.00 to +2.00", "8 of 8", "0.0078")),
            ("test_loss", (None, 1, 1, 1.0), ("-", "1 of 1", "-")),
        ],
    )
    def test_format_certainty(self, metric, difference, told):
        keys = ("interval", "favour", "n", "sign_test")
        assert console.format_certainty(metric, dict(zip(keys, difference, strict=True))) == told

    def test_epoch_lines_show_means_over_replicates(self):
        lines = [
            *(line(1, "bn", r, train_cost=x, test_accuracy=0.5) for r, x in enumerate([1.0, 2.0])),
            *(line(1, "no_bn", r, test_loss=x) for r, x in enumerate([3.0, 5.0])),
        ]
        *heading, shown = show(Boostcourse(epochs=4, replicates=2), lines).splitlines()
        assert "means of 2 replicates" in heading[0]
        assert shown.split() == [
            *("1/4", "1.5000", "0.5000", "50.00", "%", "0.5000", "4.0000", "50.00", "%", "0.25"),
        ]

    @pytest.mark.parametrize("cost", [1e6, 1e12, 1e30, math.nan])
    def test_epoch_lines_keep_numbers_apart(self, cost):
        changes = {"train_cost": cost, "test_loss": cost}
        text = show(Boostcourse(), [line(1, arm, **changes) for arm in metrics.ARMS])
        shown = text.splitlines()[-1].replace(" %", "%").split()
        assert len(shown) == 8
        assert [float(shown[k]) for k in (1, 2, 4, 5)] == pytest.approx([cost] * 4, nan_ok=True)

    @pytest.mark.parametrize("bar", [True, False])
    def test_a_terminal_gets_a_bar(self, bar):
        text = show(
            Boostcourse(epochs=4), [line(1, arm) for arm in metrics.ARMS], bar, terminal=True
        )
        assert ("time left" in text) == bar
        assert ("bn 50.00 %, no_bn 50.00 %" in text) == bar

    def test_a_pipe_gets_none(self):
        text = show(Boostcourse(epochs=4), [line(1, arm) for arm in metrics.ARMS], bar=True)
        assert "time left" not in text
        assert "\x1b" not in text

    def test_plain_lines_stay_as_they_are(self):
        text = "a [bold] path/with-123 " + "and no end " * 20
        assert render(lambda to: console.print_plain(to, text)) == text + "\n"


def render(print_to, terminal: bool = False) -> str:
    file = io.StringIO()
    print_to(Console(file=file, width=100, force_terminal=terminal))
    return file.getvalue()


def show(experiment, lines, bar: bool = False, terminal: bool = False) -> str:
    def print_to(to: Console) -> None:
        with console.EpochLines(to, experiment, 0, bar, 1000) as epoch_lines:
            epoch_lines.add(lines)

    return render(print_to, terminal)


class TestFigures:
    @pytest.mark.parametrize(("epochs", "replicates"), [(1, 1), (4, 1), (4, 3), (20, 2)])
    def test_curves_are_pictures(self, epochs, replicates):
        figure = figures.curves(metrics.curves(make_lines(epochs, replicates)))
        with Image.open(io.BytesIO(figures.to_png(figure))) as png:
            assert (png.format, png.size) == ("PNG", (1800, 600))
        svg = ElementTree.fromstring(figures.to_svg(figure))
        assert svg.tag == "{http://www.w3.org/2000/svg}svg"

    def test_curves_label_everything(self):
        figure = figures.curves(metrics.curves(make_lines(epochs=3, replicates=1)))
        for axes, title in zip(figure.axes, ("cost", "loss", "accuracy"), strict=True):
            assert title in axes.get_title(loc="left")
            assert axes.get_xlabel() == "epoch"
            assert axes.get_ylabel()
            assert [t.get_text() for t in axes.get_legend().get_texts()] == list(
                figures.LABELS.values()
            )

    def test_curves_differ_without_colour(self):
        figure = figures.curves(metrics.curves(make_lines(epochs=3, replicates=1)))
        for axes in figure.axes:
            first, second = axes.get_lines()
            assert first.get_linestyle() != second.get_linestyle()
            assert first.get_marker() != second.get_marker()

    @pytest.mark.parametrize("replicates", [1, 3])
    def test_curves_draw_the_metrics(self, replicates):
        by_arm = metrics.curves(make_lines(epochs=4, replicates=replicates))
        axes = figures.curves(by_arm).axes
        for panel, metric, scale in ((0, "train_cost", 1), (2, "test_accuracy", 100)):
            for arm, drawn in zip(metrics.ARMS, axes[panel].get_lines(), strict=True):
                np.testing.assert_array_equal(drawn.get_xdata(), [1, 2, 3, 4])
                np.testing.assert_allclose(
                    drawn.get_ydata(), scale * by_arm[arm][metric].mean(axis=1)
                )
            assert len(axes[panel].collections) == (2 if replicates > 1 else 0)

    @pytest.mark.parametrize("diverged", [metrics.ARMS[:1], metrics.ARMS])
    def test_curves_bear_what_is_not_finite(self, diverged):
        lines = make_lines(epochs=3, replicates=2)
        for one in lines:
            if one["arm"] in diverged:
                one.update(train_cost=None, train_loss=None, test_loss=None)
        figure = figures.curves(metrics.curves(lines))
        assert figures.to_png(figure)
        assert figures.to_svg(figure)

    def test_same_numbers_same_svg(self):
        once, again = (
            figures.to_svg(figures.curves(metrics.curves(make_lines(4, 3)))) for _ in range(2)
        )
        other = figures.to_svg(figures.curves(metrics.curves(make_lines(4, 3, seed=1))))
        assert once == again != other

    @pytest.mark.parametrize(
        ("sizes", "sides"), [((64, 64), (8, 8)), ((32, 5, 1), (6, 3, 1)), ((10,), (4,))]
    )
    def test_features_are_squares(self, sizes, sides):
        rng = np.random.default_rng(0)
        probes = {
            f"{arm}/features_{number}": rng.uniform(1, 2, (2, 1, size)).astype(np.float32)
            for arm in metrics.ARMS
            for number, size in enumerate(sizes, start=1)
        }
        image = rng.integers(0, 256, (28, 28), np.uint8)
        figure = figures.features(image, 6, probes)
        columns = len(sizes) + 1
        assert len(figure.axes) == 2 * columns
        for row, arm in enumerate(metrics.ARMS):
            first, *layers = figure.axes[row * columns : (row + 1) * columns]
            np.testing.assert_array_equal(first.images[0].get_array(), image)
            assert first.get_ylabel() == figures.LABELS[arm]
            for number, (axes, size, side) in enumerate(zip(layers, sizes, sides, strict=True), 1):
                drawn = np.ma.filled(axes.images[0].get_array(), np.nan)
                assert drawn.shape == (side, side)
                expected = probes[f"{arm}/features_{number}"][0, 0]
                np.testing.assert_array_equal(drawn.ravel()[:size], expected)
                assert np.isnan(drawn.ravel()[size:]).all()
        with Image.open(io.BytesIO(figures.to_png(figure))) as png:
            assert png.format == "PNG"


def test_a_diverged_replicate_counts_in_no_metric():
    lines = [line(1, arm, replicate=k) for arm in metrics.ARMS for k in range(3)]
    lines[1] |= {"train_cost": None, "test_loss": None, "test_accuracy": 0.1}
    summary = metrics.summarize(lines)["arms"]["bn"]
    assert {metric: summary[metric]["n"] for metric in summary} == dict.fromkeys(metrics.METRICS, 2)

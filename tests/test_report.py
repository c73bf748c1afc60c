"""The page of a run: its words, its pictures, and what it says of itself."""

import re

import numpy as np
import pytest
from factories import line, make_end, make_probes, save_run

from experiments import report
from experiments.lab import metrics, rundir
from experiments.lab.presets import Boostcourse, Deep10, Lab10
from experiments.report import __main__ as command
from experiments.report import layers, predictions, words


@pytest.fixture
def write(tmp_path):
    """Writes the page of a run."""

    def write(experiment, replicates: int = 1, requested: str = "digits") -> str:
        save_run(tmp_path / "run", experiment, replicates, requested)
        report.redraw(tmp_path / "run")
        return " ".join((tmp_path / "run" / "report.html").read_text().split())

    return write


@pytest.mark.parametrize(
    "experiment", [Boostcourse(epochs=2), Deep10(epochs=1, hidden_sizes=(7,) * 10)]
)
def test_pictures_are_inside_and_described(write, tmp_path, experiment):
    page = write(experiment)
    pictures = re.findall(r'<img[^>]* src="data:image/(\S+?);base64,[^"]+" alt="([^"]+)"', page)
    digits = [alt for _, alt in pictures if re.fullmatch(r"Test example of class \d", alt)]
    assert len(pictures) == page.count("<img") == 6 + len(digits)
    assert {kind for kind, _ in pictures} == {"png", "svg+xml"}
    assert all(len(alt) > 60 for _, alt in pictures if alt not in digits)
    assert (tmp_path / "run" / "features.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("dataset", "requested", "said"),
    [("digits", "auto", True), ("digits", "digits", False), ("mnist", "auto", False)],
)
def test_says_when_digits_took_the_place_of_mnist(write, dataset, requested, said):
    page = write(Lab10(epochs=1, dataset=dataset), requested=requested)
    assert ("MNIST could not be had" in page) == said


@pytest.mark.parametrize("replicates", [1, 3])
def test_says_what_the_spread_is(write, replicates):
    page = write(Lab10(epochs=2), replicates)
    assert ("One replicate: no interval" in page) == (replicates == 1)
    assert ("Lines are means of 3 replicates" in page) == (replicates == 3)
    assert ("±" in page) == (replicates == 3)


def test_escapes_what_it_shows(write):
    page = write(Lab10(epochs=1, bn_init="normal(0.05)"))
    assert "--bn-init &#39;normal(0.05)&#39;" in page


@pytest.mark.parametrize(("statistics", "told"), [("local", True), ("global", False)])
def test_the_mesh_is_part_of_a_run_with_local_statistics(write, statistics, told):
    page = write(Lab10(epochs=1, bn_statistics=statistics))
    assert ("--mesh replicate=3,data=1" in page) == told


def summary(*accuracies: tuple[float | None, float | None]) -> dict:
    """Of replicates with these test accuracies, with and without BN; None diverged."""
    lines = [
        line(1, arm, k, test_accuracy=value or 0.1, train_cost=None if value is None else 0.5)
        for k, pair in enumerate(accuracies)
        for arm, value in zip(metrics.ARMS, pair, strict=True)
    ]
    return metrics.summarize(lines)


@pytest.mark.parametrize(
    ("accuracies", "told"),
    [
        (
            [(0.97, 0.96)],
            "With batch normalization test accuracy was 1.0 points higher: 97.00 % against "
            "96.00 %, in one replicate",
        ),
        (
            [(0.97, 0.96), (0.98, 0.96)],
            "With batch normalization test accuracy was 1.5 points higher, in 2 of 2 "
            "replicates; 95 % interval -4.9 to +7.9 points, which includes no difference",
        ),
        (
            [(0.90, 0.96), (0.91, 0.97)],
            "With batch normalization test accuracy was 6.0 points lower, in 2 of 2 "
            "replicates; 95 % interval -6.0 to -6.0 points",
        ),
        (
            [(0.9, 0.9)],
            "With and without batch normalization test accuracy was the same: 90.00 % against "
            "90.00 %, in one replicate",
        ),
        (
            [(0.97, 0.96), (0.98, 0.96), (0.9, None)],
            "With batch normalization test accuracy was 1.5 points higher, in 2 of 2 replicates; "
            "95 % interval -4.9 to +7.9 points, which includes no difference; 1 left out, in which "
            "a network diverged",
        ),
        (
            [(0.9, 0.9), (0.91, 0.91)],
            "With and without batch normalization test accuracy was the same, higher with it in 0 "
            "of 2 replicates; 95 % interval +0.0 to +0.0 points",
        ),
        (
            [(0.9, None)],
            "Without BN the network diverged in every replicate; with BN test accuracy was 90.00 %",
        ),
        ([(None, None)], "Both networks diverged in every replicate"),
        (
            [(0.9, None), (None, 0.9)],
            "No pair of networks was left to compare: in each one of them diverged",
        ),
    ],
)
def test_headline(accuracies, told):
    assert words.headline(summary(*accuracies)) == told


def test_pictures_bear_what_is_not_finite():
    experiment = Lab10(epochs=1)
    probes = {
        name: np.full_like(a, np.nan)
        for name, a in make_probes(experiment, 2).items()
        if a.dtype.kind == "f"
    }
    probes |= {f"{arm}/histograms": np.zeros((2, 2, 60), int) for arm in metrics.ARMS}
    assert layers.percentiles([probes]).axes
    assert layers.histograms(probes, probes).axes
    assert layers.gradient_norms(probes, probes).axes


def test_digits_that_one_network_alone_gets_right():
    end = make_end(Lab10())
    for arm, digits in predictions.disagreements(end).items():
        assert len(digits) == len(end[f"only_{arm}"]) > 0
        assert all(digit.label != digit.taken for digit in digits)


def end_of(labels: list[int], **predictions: list[int]) -> dict[str, np.ndarray]:
    said = {f"{arm}/predictions": np.array(guesses) for arm, guesses in predictions.items()}
    return {"labels": np.array(labels), **said}


class TestWords:
    """What a page says, of numbers that show what is confused with what."""

    def test_mistakes(self):
        end = end_of([3, 3, 3, 5], bn=[3, 5, 5, 5], no_bn=[3, 300, 12, 2])
        assert words.mistakes(predictions.confusions(end)) == (
            "With BN 2 mistakes, most often 3 taken for 5 (2 times); "
            "without BN 3 mistakes, most often 3 taken for something else (2 times)"
        )
        assert words.mistakes(predictions.confusions(end_of([1], bn=[1], no_bn=[1]))) == (
            "With BN 0 mistakes; without BN 0 mistakes"
        )

    def test_gradients_leave_out_what_is_not_finite(self):
        last = {
            "bn/gradient_norms": np.array([[0.1, 9.0, 0.4], [0.3, 9.0, 0.6]]),
            "no_bn/gradient_norms": np.array([[2.0, 9.0, np.nan], [np.nan, 9.0, np.nan]]),
        }
        assert words.gradients(last) == (
            "After the last epoch: with BN 0.2 in the first layer, 0.5 in the last; "
            "without BN 2 in the first layer, not finite in the last."
        )

    def test_activations(self):
        percentiles = np.arange(20.0).reshape(2, 2, 5)
        last = {"bn/percentiles": percentiles, "no_bn/percentiles": -percentiles[:, :, ::-1]}
        assert words.activations(last, 1) == (
            "After the last epoch nine tenths of them lie, in the last layer, with BN from 15 to "
            "19, without BN from -19 to -15."
        )

    def test_statistics_are_told_from_the_input_on(self):
        end = {}
        for layer in (10, 2, 0):  # as the names of files sort
            end[f"population/BatchNorm_{layer}/var"] = np.array([1.0, 2.0])
            end[f"running/BatchNorm_{layer}/var"] = (layer + 1) * np.array([1.0, 2.0])
        assert "layer by layer, 1.000, 3.000, 11.000." in words.statistics(end)

    def test_features(self):
        last = {
            "bn/features_1": np.array([[[0.0, 1.0]], [[0.0, 0.0]]]),
            "no_bn/features_1": np.array([[[1.0, 1.0]], [[0.0, 1.0]]]),
        }
        assert "layer by layer: with BN 100%; without BN 50%." in words.features(6, last, 1)

    @pytest.mark.parametrize(
        ("cost", "told"),
        [(0.4, "training cost was 0.1 lower"), (0.75, "training cost was 0.25 higher")],
    )
    def test_losses(self, cost, told):
        lines = [line(1, "bn", train_cost=cost), line(1, "no_bn", train_cost=0.5)]
        assert words.losses(metrics.summarize(lines)) == f"Test loss was 0 lower, {told} with it."


class TestPictures:
    """What is drawn is what was saved, and lies within the picture."""

    def test_gradient_norms(self):
        first = {f"{arm}/gradient_norms": np.full((1, 3), 0.01) for arm in metrics.ARMS}
        last = {f"{arm}/gradient_norms": np.full((1, 3), 30.0) for arm in metrics.ARMS}
        for axes in layers.gradient_norms(first, last).axes:
            low, high = axes.get_ylim()
            assert low < 0.01 < 30 < high

    def test_percentiles(self):
        experiment = Lab10(epochs=1)
        epochs = [make_probes(experiment, 2, epoch) for epoch in range(3)]
        axes = layers.percentiles(epochs, 1).axes[0]
        expected = np.stack([probes["bn/percentiles"][1, 0] for probes in epochs])
        np.testing.assert_array_equal(axes.lines[0].get_ydata(), expected[:, 2])
        wide = axes.collections[0].get_paths()[0].vertices[:, 1]
        assert (wide.min(), wide.max()) == (expected[:, 0].min(), expected[:, 4].max())

    def test_statistics(self):
        end = make_end(Lab10())
        means, deviations = layers.statistics(end).axes[::2]
        for axes, name, of in ((means, "mean", np.asarray), (deviations, "var", np.sqrt)):
            drawn = axes.lines[1]
            whole, running = (of(end[f"{k}/BatchNorm_0/{name}"]) for k in ("population", "running"))
            np.testing.assert_array_equal(drawn.get_xdata(), whole)
            np.testing.assert_array_equal(drawn.get_ydata(), running)


def test_tables_of_confusions(write, tmp_path):
    """Read back from the page, they are what was counted one by one."""
    page = write(Lab10(epochs=1))
    end = make_end(Lab10())
    tables = re.findall(r'<table class="confusion">(.*?)</table>', page, flags=re.DOTALL)
    for table, arm in zip(tables, metrics.ARMS, strict=True):
        counted = [[0] * 10 for _ in range(10)]
        for label, taken in zip(end["labels"], end[f"{arm}/predictions"], strict=True):
            counted[label][taken] += 1
        rows = [re.findall(r"<td[^>]*>(\d*)</td>", row) for row in table.split("<tr>")[2:]]
        assert [[int(count or 0) for count in row] for row in rows] == counted


def test_of_a_run_in_which_all_diverged(tmp_path):
    path = tmp_path / "run"
    save_run(path, Lab10(epochs=1))
    (path / "metrics.jsonl").unlink()
    metrics.append(path, [line(1, arm, train_loss=float("nan")) for arm in metrics.ARMS])
    (path / "probes" / "end.npz").unlink()
    report.redraw(path)
    page = (path / "report.html").read_text()
    assert "there is nothing left to look into" in page
    assert "Confusion" not in page


class TestCommand:
    def test_draws_again_what_a_run_drew(self, tmp_path, capsys):
        path = tmp_path / "run"
        save_run(path, Lab10(epochs=2), 2)
        report.redraw(path)
        before = {f.name: f.read_bytes() for f in path.iterdir() if f.is_file()}
        for name in ("report.html", "curves.svg", "summary.json"):
            (path / name).unlink()
        assert command.main([str(path)]) == 0
        assert {f.name: f.read_bytes() for f in path.iterdir() if f.is_file()} == before
        assert f"report: {path / 'report.html'}" in capsys.readouterr().out

    def test_of_a_run_that_has_not_ended(self, tmp_path, capsys):
        path = tmp_path / "run"
        save_run(path, Lab10(epochs=2))
        (path / "probes" / "end.npz").unlink()
        assert command.main([str(path)]) == 2
        before = (path / "config.json").read_bytes()
        assert "has not ended: go on with" in capsys.readouterr().err
        assert {file.name for file in path.iterdir()} == {"config.json", "metrics.jsonl", "probes"}
        assert (path / "config.json").read_bytes() == before

    def test_of_torn_metrics(self, tmp_path, capsys):
        path = tmp_path / "run"
        save_run(path, Lab10(epochs=2))
        report.redraw(path)
        summary = (path / "summary.json").read_bytes()
        (path / "metrics.jsonl").write_bytes((path / "metrics.jsonl").read_bytes()[:300])
        assert command.main([str(path)]) == 2
        assert "has not ended" in capsys.readouterr().err
        assert (path / "summary.json").read_bytes() == summary

    def test_of_probes_that_lack_something(self, tmp_path, capsys):
        path = tmp_path / "run"
        save_run(path, Lab10(epochs=1))
        rundir.write_arrays(path / "probes" / "end.npz", {"labels": np.zeros(3, np.uint8)})
        assert command.main([str(path)]) == 2
        assert "another version saved them, or they are damaged" in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["metrics.jsonl", "probes/epoch-002.npz", "probes/end.npz"])
    @pytest.mark.parametrize("content", [b"", b"PK\3\4", b"\x93NUMPY"])
    def test_of_damaged_files(self, tmp_path, capsys, name, content):
        path = tmp_path / "run"
        save_run(path, Lab10(epochs=2))
        (path / name).write_bytes(content)
        assert command.main([str(path)]) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ")
        assert name in told or "has not ended" in told
        assert len(told.splitlines()) == 1

    def test_of_something_else(self, tmp_path, capsys):
        assert command.main([str(tmp_path)]) == 2
        assert "is not a run directory" in capsys.readouterr().err

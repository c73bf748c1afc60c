"""The page of a run: its words, its pictures, and what it says of itself."""

import contextlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from command import blank_pictures
from factories import line, make_end, make_probes, named, save_run

from experiments import report
from experiments.lab import Run, metrics, rundir
from experiments.lab.presets import BOOSTCOURSE, DEEP10, LAB10
from experiments.report import __main__ as command
from experiments.report import figures, layers, predictions, words

TWO = ("bn", "no_bn")
THREE = ("bn", "no_bn", "layer_norm")
EIGHT = ("no_bn", "bn", "layer_norm", "ghost_bn(25)", "group_norm(8)", "mean_only_bn", "bn_after")
EIGHT += ("batch_renorm",)
TITLES = named(EIGHT, "title")
STYLES = figures.arm_styles(named(TWO, "label"))
NAMES = words.phrases(named(TWO, "label"), named(TWO, "title"))


@pytest.fixture
def write(tmp_path):
    """Writes the page of a run."""

    def write(experiment, replicates=1, requested="digits", *, pictures=False) -> str:
        save_run(tmp_path / "run", experiment, replicates, requested)
        with contextlib.nullcontext() if pictures else blank_pictures():
            report.redraw(tmp_path / "run")
        return " ".join((tmp_path / "run" / "report.html").read_text().split())

    return write


@pytest.mark.parametrize(
    "experiment",
    [replace(BOOSTCOURSE, epochs=2), replace(DEEP10, epochs=1, hidden_sizes=(7,) * 10)],
)
def test_pictures_are_inside_and_described(write, tmp_path, experiment):
    page = write(experiment, pictures=True)
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
    page = write(replace(LAB10, epochs=1, dataset=dataset), requested=requested)
    assert ("MNIST could not be had" in page) == said


@pytest.mark.parametrize("replicates", [1, 3])
def test_says_what_the_spread_is(write, replicates):
    page = write(replace(LAB10, epochs=2), replicates)
    assert ("One replicate: no interval" in page) == (replicates == 1)
    assert ("Lines are means of 3 replicates" in page) == (replicates == 3)
    assert ("±" in page) == (replicates == 3)


def test_escapes_what_it_shows(write):
    page = write(replace(LAB10, epochs=1, bn_init="normal(0.05)"))
    assert "--bn-init &#39;normal(0.05)&#39;" in page


@pytest.mark.parametrize(("statistics", "told"), [("local", True), ("global", False)])
def test_the_mesh_is_part_of_a_run_with_local_statistics(write, statistics, told):
    page = write(replace(LAB10, epochs=1, bn_statistics=statistics))
    assert ("--mesh replicate=3,data=1" in page) == told


def summary(*accuracies: tuple[float | None, ...], arms=TWO, reference="no_bn") -> dict:
    """Of replicates in which the arms have these test accuracies; None diverged."""
    lines = [
        line(1, arm, k, test_accuracy=value or 0.1, train_cost=None if value is None else 0.5)
        for k, values in enumerate(accuracies)
        for arm, value in zip(arms, values, strict=True)
    ]
    return metrics.summarize(metrics.curves(lines, arms), reference)


def headline(of: dict) -> str:
    labels, titles = (named(of["arms"], what) for what in ("label", "title"))
    return words.headline(of, labels, titles)


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
            "With batch normalization test accuracy was the same as without: 90.00 % against "
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
            "With batch normalization test accuracy was the same as without, higher in 0 of 2 "
            "replicates; 95 % interval +0.0 to +0.0 points",
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
    assert headline(summary(*accuracies)) == told


@pytest.mark.parametrize(
    ("arms", "accuracies", "told"),
    [
        (
            ("layer_norm", "bn"),
            [(0.97, 0.96)],
            "With layer normalization test accuracy was 1.0 points higher than with batch "
            "normalization: 97.00 % against 96.00 %, in one replicate",
        ),
        (
            ("no_bn", "bn"),
            [(0.95, 0.96)],
            "Without BN test accuracy was 1.0 points lower than with batch normalization: 95.00 % "
            "against 96.00 %, in one replicate",
        ),
        (
            ("layer_norm", "bn"),
            [(None, 0.9)],
            "With layer normalization the network diverged in every replicate; with BN test "
            "accuracy was 90.00 %",
        ),
        (("bn",), [(0.9,)], "With BN test accuracy was 90.00 %"),
        (("bn",), [(None,)], "The network diverged in every replicate"),
    ],
)
def test_headline_of_other_arms(arms, accuracies, told):
    assert headline(summary(*accuracies, arms=arms, reference=arms[-1])) == told


@pytest.mark.parametrize(
    ("accuracies", "told"),
    [
        (
            [(0.97, 0.95, 0.96), (0.98, 0.96, 0.96)],
            "Test accuracy was best with batch normalization, 97.50 ± 0.71 %: 2.0 points higher "
            "than without BN, in 2 of 2 replicates; 95 % interval +2.0 to +2.0 points",
        ),
        (
            [(0.93, 0.95, 0.94), (0.93, 0.95, 0.93)],
            "Test accuracy was best without BN, 95.00 ± 0.00 %; with layer normalization it was "
            "1.5 points lower than without BN, in 2 of 2 replicates; 95 % interval -7.9 to +4.9 "
            "points, which includes no difference",
        ),
        (
            [(0.97, 0.96, 0.97)],
            "Test accuracy was best with batch normalization and with layer normalization, "
            "97.00 %; with BN it was 1.0 points higher than without BN, in one replicate",
        ),
        (
            [(0.97, 0.95, 0.96), (None, 0.95, 0.96), (None, None, 0.96)],
            "Test accuracy was best with layer normalization, 96.00 ± 0.00 %: 1.0 points higher "
            "than without BN, in 2 of 2 replicates; 95 % interval +1.0 to +1.0 points; 1 left out, "
            "in which a network diverged; not ranked, as they diverged: with BN in 2, without BN "
            "in 1 of 3",
        ),
        (
            [(0.97, None, 0.96)],
            "Test accuracy was best with batch normalization, 97.00 %; not ranked, as they "
            "diverged: without BN in 1 of 1",
        ),
        (
            [(None, 0.95, 0.96), (None, 0.95, None), (0.9, 0.95, None)],
            "Test accuracy was best without BN, 95.00 ± 0.00 %; with layer normalization it was "
            "1.0 points higher than without BN, in one replicate; "
            "2 left out, in which a network diverged; not ranked, as they diverged: with BN in 2, "
            "with layer normalization in 2 of 3",
        ),
        (
            [(None, 0.95, None)],
            "With BN and with layer normalization the network diverged in every replicate; without "
            "BN test accuracy was 95.00 %",
        ),
        ([(None, None, None)], "All networks diverged in every replicate"),
    ],
)
def test_headline_of_three_arms(accuracies, told):
    assert headline(summary(*accuracies, arms=THREE)) == told


def test_pictures_bear_what_is_not_finite():
    experiment = replace(LAB10, epochs=1)
    probes = {
        name: np.full_like(a, np.nan)
        for name, a in make_probes(experiment, 2).items()
        if a.dtype.kind == "f"
    }
    probes |= {f"{arm}/histograms": np.zeros((2, 2, 60), int) for arm in TWO}
    assert layers.percentiles([probes], STYLES).axes
    assert layers.histograms(probes, probes, STYLES).axes
    assert layers.gradient_norms(probes, probes, STYLES).axes


@pytest.mark.parametrize("reference", THREE)
def test_digits_that_one_network_alone_gets_right(reference):
    end = make_end(replace(LAB10, arms=THREE))
    first = next(arm for arm in THREE if arm != reference)
    for arm, digits in predictions.disagreements(end, THREE, reference).items():
        assert len(digits) == len(end[f"only_{arm}"]) > 0
        assert all(label != taken for _, label, taken in digits)
        other = end[f"{first if arm == reference else reference}/predictions"]
        assert [taken for _, _, taken in digits] == other[end[f"only_{arm}"]].tolist()


def end_of(labels: list[int], **predictions: list[int]) -> dict[str, np.ndarray]:
    said = {f"{arm}/predictions": np.array(guesses) for arm, guesses in predictions.items()}
    return {"labels": np.array(labels), **said}


class TestWords:
    """What a page says, of numbers that show what is confused with what."""

    def test_mistakes(self):
        end = end_of([3, 3, 3, 5], bn=[3, 5, 5, 5], no_bn=[3, 300, 12, 2])
        assert (
            words.mistakes(predictions.confusion(end, "bn"))
            == "2 mistakes, most often 3 taken for 5 (2 times)"
        )
        told = "3 mistakes, most often 3 taken for something else (2 times)"
        assert words.mistakes(predictions.confusion(end, "no_bn")) == told
        none = predictions.confusion(end_of([1], bn=[1]), "bn")
        assert words.mistakes(none) == "0 mistakes"

    def test_statistics_are_told_in_the_order_of_the_file(self):
        end = {}
        for arm, factor in (("bn", 1), ("bn_after", 2)):
            for layer in (0, 2, 10):
                place = f"{arm}/{{}}/Block_{layer}/BatchNorm_0/{{}}"
                end[place.format("running", "mean")] = np.zeros(2)
                end[place.format("running", "var")] = factor * (layer + 1) * np.array([1.0, 2.0])
                end[place.format("population", "var")] = np.array([1.0, 2.0])
        assert words.statistics(end, "bn") == "1.000, 3.000, 11.000"
        assert words.statistics(end, "bn_after") == "2.000, 6.000, 22.000"


class TestPictures:
    """What is drawn is what was saved, and lies within the picture."""

    def test_gradient_norms(self):
        first = {f"{arm}/gradient_norms": np.full((1, 3), 0.01) for arm in TWO}
        last = {f"{arm}/gradient_norms": np.full((1, 3), 30.0) for arm in TWO}
        for axes in layers.gradient_norms(first, last, STYLES).axes:
            low, high = axes.get_ylim()
            assert low < 0.01 < 30 < high

    def test_percentiles(self):
        experiment = replace(LAB10, epochs=1)
        epochs = [make_probes(experiment, 2, epoch) for epoch in range(3)]
        axes = layers.percentiles(epochs, STYLES, 1).axes[0]
        expected = np.stack([probes["bn/percentiles"][1, 0] for probes in epochs])
        np.testing.assert_array_equal(axes.lines[0].get_ydata(), expected[:, 2])
        wide = axes.collections[0].get_paths()[0].vertices[:, 1]
        assert (wide.min(), wide.max()) == (expected[:, 0].min(), expected[:, 4].max())

    def test_statistics(self):
        end = make_end(LAB10)
        means, deviations = layers.statistics(end, STYLES).axes[::2]
        for axes, name, of in ((means, "mean", np.asarray), (deviations, "var", np.sqrt)):
            drawn = axes.lines[1]
            whole, running = (
                of(end[f"bn/{k}/BatchNorm_0/{name}"]) for k in ("population", "running")
            )
            np.testing.assert_array_equal(drawn.get_xdata(), whole)
            np.testing.assert_array_equal(drawn.get_ydata(), running)


def test_captions_tell_what_was_recorded(tmp_path):
    """Layer by layer, of the replicate that is looked into."""
    path = tmp_path / "run"
    save_run(path, replace(LAB10, epochs=1), 2)
    last, end = (Run(path).probes(name) for name in ("epoch-001", "end"))
    last |= {name: np.where(x < 0.3, 0, x) for name, x in last.items() if "features" in name}
    last["bn/gradient_norms"] = np.array([[0.1, 9.0, 0.4], [0.3, 9.0, 0.6]])
    last["no_bn/gradient_norms"] = np.array([[2.0, 9.0, np.nan], [np.nan, 9.0, np.nan]])
    rundir.write_arrays(path / "probes" / "epoch-001.npz", last)
    with blank_pictures():
        report.redraw(path)
    page = " ".join((path / "report.html").read_text().split())
    zeros = {
        name: ", ".join(f"{np.mean(last[f'{arm}/features_{k}'][0] == 0):.0%}" for k in (1, 2))
        for arm, name in NAMES.items()
    }
    assert len({*zeros.values(), "0%, 0%"}) == 3
    told = "; ".join(f"{name} {shares}" for name, shares in zeros.items())
    assert f"Shares of values that are zero, layer by layer: {told}.</" in page
    spreads = {name: last[f"{arm}/percentiles"][0, -1] for arm, name in NAMES.items()}
    told = ", ".join(f"{name} from {x[0]:.3g} to {x[-1]:.3g}" for name, x in spreads.items())
    assert f"nine tenths of them lie, in the last layer, {told}.</" in page
    told = "with BN 0.2 in the first layer, 0.5 in the last; without BN 2 in the first layer, not"
    assert f"After the last epoch: {told} finite in the last." in page
    assert f"is, layer by layer, {words.statistics(end, 'bn')}.</" in page
    counts = {arm: predictions.confusion(end, arm) for arm in TWO}
    told = "; ".join(f"{name} {words.mistakes(counts[arm])}" for arm, name in NAMES.items())
    assert f"W{told[1:]}.</p>" in page


@pytest.mark.parametrize(
    ("cost", "told"),
    [(0.4, "training cost was 0.1 lower"), (0.75, "training cost was 0.25 higher")],
)
def test_losses_are_compared(tmp_path, cost, told):
    path = tmp_path / "run"
    lines = save_run(path, replace(LAB10, epochs=1))
    for one in lines:
        one.update(test_loss=0.5, train_cost=cost if one["arm"] == "bn" else 0.5)
    metrics.write(path, lines)
    with blank_pictures():
        report.redraw(path)
    page = " ".join((path / "report.html").read_text().split())
    assert f"<p>Test loss was 0 lower, {told} with it.</p>" in page


def test_tables_of_confusions(write, tmp_path):
    """Read back from the page, they are what was counted one by one."""
    page = write(replace(LAB10, epochs=1))
    end = make_end(LAB10)
    tables = re.findall(r'<table class="confusion">(.*?)</table>', page, flags=re.DOTALL)
    for table, arm in zip(tables, TWO, strict=True):
        counted = [[0] * 10 for _ in range(10)]
        for label, taken in zip(end["labels"], end[f"{arm}/predictions"], strict=True):
            counted[label][taken] += 1
        rows = [re.findall(r"<td[^>]*>(\d*)</td>", row) for row in table.split("<tr>")[2:]]
        assert [[int(count or 0) for count in row] for row in rows] == counted


def test_probes_are_read_as_written(write, tmp_path):
    write(replace(LAB10, epochs=1))
    found = Run(tmp_path / "run").probes("end")
    assert list(found) == list(make_end(LAB10))
    for name, values in make_end(LAB10).items():
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("replicates", [1, 3])
@pytest.mark.parametrize("arms", [("bn",), THREE, EIGHT])
def test_any_arms(write, tmp_path, arms, replicates):
    page = write(replace(LAB10, epochs=2, arms=arms), replicates)
    titles, reference = [TITLES[arm] for arm in arms], arms[-1]
    for title in titles:
        assert f'<th scope="{"row" if len(arms) > 2 else "col"}"' in page
        assert f">{title}</th>" in page
    assert page.count('<table class="confusion">') == len(arms)
    assert page.count("Right only") == (len(arms) if len(arms) > 1 else 0)
    assert f"for {len(arms) * replicates} network" in page
    assert ("Difference from the reference: " + TITLES[reference] in page) == (len(arms) > 2)
    rows = page.count("of 3</td>")
    assert rows == (5 * (len(arms) - 1) if replicates > 1 else 0)
    saved = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(saved["arms"]) == list(arms)
    assert saved["reference"] == reference


@pytest.mark.parametrize("arms", [THREE, EIGHT])
def test_arms_that_diverged(tmp_path, arms):
    """The first in every replicate, the second in one of two."""
    path = tmp_path / "run"
    lines = save_run(path, replace(LAB10, epochs=1, arms=arms), replicates=2)
    for one in lines:
        if one["arm"] == arms[0] or (one["arm"], one["replicate"]) == (arms[1], 0):
            one.update(train_cost=None, test_accuracy=0.99)
    metrics.write(path, lines)
    report.redraw(path)
    page = " ".join((path / "report.html").read_text().split())
    first, second = NAMES[arms[0]], NAMES[arms[1]]
    assert f"not ranked, as they diverged: {first} in 2, {second} in 1 of 2</h1>" in page
    rows = re.findall(r'<tr><th scope="row">([^<]+)</th>(.*?)</tr>', page)
    found = {arm: [cells for name, cells in rows if name == TITLES[arm]] for arm in arms}
    for count, arm in zip((0, 1, 2), arms, strict=False):
        final, *differences = found[arm]
        assert final.count(f"(n = {count})") == (5 if count < 2 else 0)
        assert all(f" of {count}</td>" in cells for cells in differences)
    assert all("99.00" not in cells for _, cells in rows)
    assert f"Networks that diverged are left out: {first}.</p>" in page
    assert "What follows is of replicate 1" in page
    assert page.count('<table class="confusion">') == len(arms) - 1
    assert "Where the networks disagree" not in page


def test_layers_of_arms_of_different_depth():
    probes = {f"a/{name}": values for name, values in make_bare(3).items()}
    probes |= {f"b/{name}": values for name, values in make_bare(7).items()}
    styles = figures.arm_styles({"a": "A", "b": "B"})
    for figure in (
        layers.percentiles([probes], styles),
        layers.histograms(probes, probes, styles),
        layers.gradient_norms(probes, probes, styles),
        figures.features(np.zeros((28, 28)), 6, probes, styles),
    ):
        assert figures.to_svg(figure)
    panels = layers.percentiles([probes], styles).axes
    titles = [axes.get_title(loc="left") if axes.get_visible() else None for axes in panels]
    shown = [[1, 2, 3, None, None], [1, 3, 4, 5, 7]]
    assert titles == [k and f"layer {k}" for row in shown for k in row]


def make_bare(depth: int) -> dict[str, np.ndarray]:
    made = make_probes(replace(LAB10, arms=("bn",), hidden_sizes=(4,) * depth), 1)
    return {name.removeprefix("bn/"): values for name, values in made.items()}


def test_of_a_run_in_which_all_diverged(tmp_path):
    path = tmp_path / "run"
    save_run(path, replace(LAB10, epochs=1))
    (path / "metrics.jsonl").unlink()
    metrics.append(path, [line(1, arm, train_loss=float("nan")) for arm in TWO])
    (path / "probes" / "end.npz").unlink()
    report.redraw(path)
    page = (path / "report.html").read_text()
    assert "there is nothing left to look into" in page
    assert "Confusion" not in page


class TestCommand:
    def test_draws_again_what_a_run_drew(self, tmp_path, capsys):
        path = tmp_path / "run"
        save_run(path, replace(LAB10, epochs=2), 2)
        report.redraw(path)
        before = {f.name: f.read_bytes() for f in path.iterdir() if f.is_file()}
        for name in ("report.html", "curves.svg", "summary.json"):
            (path / name).unlink()
        assert command.main([str(path)]) == 0
        assert {f.name: f.read_bytes() for f in path.iterdir() if f.is_file()} == before
        assert f"report: {path / 'report.html'}" in capsys.readouterr().out

    def test_of_a_run_that_has_not_ended(self, tmp_path, capsys):
        path = tmp_path / "run"
        save_run(path, replace(LAB10, epochs=2))
        (path / "probes" / "end.npz").unlink()
        assert command.main([str(path)]) == 2
        before = (path / "config.json").read_bytes()
        assert "has not ended: go on with" in capsys.readouterr().err
        assert {file.name for file in path.iterdir()} == {"config.json", "metrics.jsonl", "probes"}
        assert (path / "config.json").read_bytes() == before

    def test_of_torn_metrics(self, tmp_path, capsys):
        path = tmp_path / "run"
        save_run(path, replace(LAB10, epochs=2))
        report.redraw(path)
        summary = (path / "summary.json").read_bytes()
        (path / "metrics.jsonl").write_bytes((path / "metrics.jsonl").read_bytes()[:300])
        assert command.main([str(path)]) == 2
        assert "has not ended" in capsys.readouterr().err
        assert (path / "summary.json").read_bytes() == summary

    def test_of_probes_that_lack_something(self, tmp_path, capsys):
        path = tmp_path / "run"
        save_run(path, replace(LAB10, epochs=1))
        rundir.write_arrays(path / "probes" / "end.npz", {"labels": np.zeros(3, np.uint8)})
        assert command.main([str(path)]) == 2
        told = capsys.readouterr().err
        assert f"{path / 'probes' / 'end.npz'} lacks bn/predictions" in told
        assert "another version saved them, or they are damaged" in told

    @pytest.mark.parametrize("name", ["metrics.jsonl", "probes/epoch-002.npz", "probes/end.npz"])
    @pytest.mark.parametrize("content", [b"", b"PK\3\4", b"\x93NUMPY"])
    def test_of_damaged_files(self, tmp_path, capsys, name, content):
        path = tmp_path / "run"
        save_run(path, replace(LAB10, epochs=2))
        (path / name).write_bytes(content)
        assert command.main([str(path)]) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ")
        assert name in told or "has not ended" in told
        assert len(told.splitlines()) == 1

    def test_of_something_else(self, tmp_path, capsys):
        assert command.main([str(tmp_path)]) == 2
        assert "is not a run directory" in capsys.readouterr().err

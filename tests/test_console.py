"""What a run shows on the terminal."""

import io
import math
from dataclasses import replace

import pytest
from factories import line, make_summary, named
from rich.console import Console

from experiments.lab import console, metrics, progress
from experiments.lab.presets import BOOSTCOURSE, Experiment

TWO = ("bn", "no_bn")
EIGHT = ("bn", "no_bn", "layer_norm", "ghost_bn(25)", "group_norm(8)", "mean_only_bn", "bn_after")
EIGHT += ("bn_no_affine",)


def render(print_to, width: int = 100, terminal: bool = False) -> str:
    file = io.StringIO()
    print_to(Console(file=file, width=width, force_terminal=terminal))
    return file.getvalue()


def show(experiment: Experiment, lines, bar: bool = False, terminal: bool = False) -> str:
    titles = named(experiment.arms, "title")

    def print_to(to: Console) -> None:
        with progress.epoch_lines(to, titles, experiment, 0, bar, 1000) as show_lines:
            show_lines(lines)

    return render(print_to, terminal=terminal)


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
def test_format_summary(metric, mean, sd, difference, text):
    summary = {"mean": mean, "sd": sd, "n": 2}
    assert console.format_summary(metric, summary, difference) == text


def test_closing_table():
    summary = make_summary(3, 2)
    text = render(lambda to: to.print(console.closing_table(summary, named(TWO, "title"))))
    assert "After 3 epochs, 2 replicates" in text
    for metric in metrics.METRICS:
        first, last = (row for row in text.splitlines() if metric.replace("_", " ") in row)
        for arm in TWO:
            assert console.format_summary(metric, summary["arms"][arm][metric]) in first
        difference = summary["differences"]["bn"][metric]
        assert console.format_summary(metric, difference, difference=True) in last
        assert all(told in last for told in console.format_certainty(metric, difference))


def test_closing_table_of_eight_arms_fits_into_80_columns():
    summary = make_summary(3, 10, arms=EIGHT)
    summary["arms"]["bn"]["test_loss"]["n"] = 7
    text = render(lambda to: to.print(console.closing_table(summary, named(EIGHT, "title"))), 80)
    rows = [row.split() for row in text.splitlines()]
    for arm in EIGHT:
        found = [" ".join(row) for row in rows if row and row[0] == arm]
        final, *differences = found
        for metric in console.SHOWN:
            assert console.format_summary(metric, summary["arms"][arm][metric]) in final
        assert ("(n = 7)" in final) == (arm == "bn")
        assert len(differences) == (arm != EIGHT[-1])
        for told in differences:
            difference = summary["differences"][arm]["test_accuracy"]
            points = console.format_summary("test_accuracy", difference, difference=True)
            assert points.removesuffix(" points") in told
            for part in console.format_certainty("test_accuracy", difference):
                assert part in told


@pytest.mark.parametrize("arms", [("bn",), TWO, EIGHT])
def test_one_replicate_has_no_interval_and_says_so(arms):
    summary = make_summary(arms=arms)
    text = render(lambda to: to.print(console.closing_table(summary, named(arms, "title"))))
    assert "no interval can be given" in text
    assert "95 % interval" not in text
    assert ("difference" in text) == (len(arms) > 1)


@pytest.mark.parametrize(
    ("metric", "difference", "told"),
    [
        ("test_loss", ((-0.25, 0.125), 3, 4, 0.625), ("-0.2500 to +0.1250", "3 of 4", "0.62")),
        ("test_accuracy", ((0.01, 0.02), 8, 8, 0.0078), ("+1.00 to +2.00", "8 of 8", "0.0078")),
        ("test_loss", (None, 1, 1, 1.0), ("-", "1 of 1", "-")),
    ],
)
def test_format_certainty(metric, difference, told):
    keys = ("interval", "wins", "n", "p")
    assert console.format_certainty(metric, dict(zip(keys, difference, strict=True))) == told


def test_epoch_lines_show_means_over_replicates():
    lines = [
        line(1, arm, r, **changes)
        for r, costs, losses in ((0, 1.0, 3.0), (1, 2.0, 5.0))
        for arm, changes in (("bn", {"train_cost": costs}), ("no_bn", {"test_loss": losses}))
    ]
    *heading, shown = show(replace(BOOSTCOURSE, epochs=4, replicates=2), lines).splitlines()
    assert "means of 2 replicates" in heading[0]
    assert shown.split() == [
        *("1/4", "1.5000", "0.5000", "50.00", "%", "0.5000", "4.0000", "50.00", "%", "0.25"),
    ]


def test_epoch_lines_of_eight_arms_fit_into_120_columns():
    lines = [line(1, arm, test_accuracy=k / 7, seconds=1234.5) for k, arm in enumerate(EIGHT)]
    lines[3]["train_cost"] = None
    experiment = replace(BOOSTCOURSE, epochs=4, arms=EIGHT)
    *heading, shown = show(experiment, lines).splitlines()
    assert len(heading) == 2
    assert max(map(len, [*heading, shown])) <= 120
    accuracies = ["nan" if k == 3 else f"{100 * k / 7:.2f}" for k in range(8)]
    assert shown.replace(" %", "").split() == ["1/4", *accuracies, "1234.50"]
    for arm, head, value in zip(EIGHT, heading[0].split(), accuracies, strict=True):
        assert arm.startswith(head.removesuffix("…"))
        assert 0 <= shown.index(f" {value} ", 8) - heading[0].index(head) < 10


@pytest.mark.parametrize("cost", [1e6, 1e12, 1e30, math.nan])
def test_epoch_lines_keep_numbers_apart(cost):
    changes = {"train_cost": cost, "test_loss": cost}
    text = show(BOOSTCOURSE, [line(1, arm, **changes) for arm in TWO])
    shown = text.splitlines()[-1].replace(" %", "%").split()
    assert len(shown) == 8
    assert [float(shown[k]) for k in (1, 2, 4, 5)] == pytest.approx([cost] * 4, nan_ok=True)


@pytest.mark.parametrize(
    ("arms", "latest"),
    [(TWO, "bn 50.00 %, no_bn 50.00 %"), ((*TWO, "layer_norm"), "best bn 50.00 %")],
)
@pytest.mark.parametrize("bar", [True, False])
def test_a_terminal_gets_a_bar(arms, latest, bar):
    experiment = replace(BOOSTCOURSE, epochs=4, arms=arms)
    text = show(experiment, [line(1, arm) for arm in arms], bar, terminal=True)
    assert ("time left" in text) == bar
    assert (latest in text) == bar


def test_a_pipe_gets_none():
    text = show(replace(BOOSTCOURSE, epochs=4), [line(1, arm) for arm in TWO], bar=True)
    assert "time left" not in text
    assert "\x1b" not in text


def test_plain_lines_stay_as_they_are():
    text = "a [bold] path/with-123 " + "and no end " * 20
    assert render(lambda to: console.print_plain(to, text)) == text + "\n"

"""The figures that two notebooks printed for their one run, among replicates of it."""

from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bnjax import paired
from experiments.claims import Claim, Evidence, Settings, interval, measured, predicted
from experiments.lab.grids import train
from experiments.lab.plan import make_arms
from experiments.lab.presets import Boostcourse, Deep10, Experiment
from experiments.mnist_bn import metric_lines
from experiments.report import figures

_PRINTED = {  # training cost of each epoch, as printed
    "bn": "1.206316 .196750 .143228 .114739 .098050 .086919 .079303 .072444 .068416 .061566 "
    ".057881 .055001 .051884 .049083 .047859",
    "no_bn": ".948875 .295372 .240833 .201998 .174786 .156808 .142556 .131019 .122854 .115048 "
    ".108034 .102573 .096396 .091615 .087302",
}
BOOSTCOURSE = {arm: tuple(map(float, costs.split())) for arm, costs in _PRINTED.items()}
DEEP10 = {"bn": 97.83, "no_bn": 95.98}


def run(experiment: Experiment, settings: Settings) -> Evidence:
    """Training costs and test accuracies of a preset, epoch by epoch."""
    replicates = settings.count(3, 20)
    keys = paired.replicate_keys(settings.seed, replicates)
    arms = make_arms(experiment)

    def measure(replicate: str) -> dict[str, dict[str, list[float]]]:
        training = train(
            arms,
            keys[int(replicate)][None],
            settings.train,
            settings.test,
            epochs=experiment.epochs,
            batch_size=experiment.batch_size,
            drop_last=experiment.drop_last,
        )
        found: dict[str, Any] = {arm: {"cost": [], "accuracy": []} for arm in figures.LABELS}
        for epoch in training:
            for line in metric_lines(epoch):
                found[line["arm"]]["cost"].append(line["train_cost"])
                found[line["arm"]]["accuracy"].append(100 * line["test_accuracy"])
        return found

    done = settings.each([*map(str, range(replicates))], measure)
    by_arm = {
        arm: {what: [one[arm][what] for one in done.values()] for what in found}
        for arm, found in done["0"].items()
    }
    if isinstance(experiment, Deep10):
        values = [_column(by_arm[arm]["accuracy"], -1) for arm in DEEP10]
        claim = CLAIMS[1]
    else:
        values = [_column(by_arm[arm]["cost"], k) for arm in BOOSTCOURSE for k in (0, -1)]
        claim = CLAIMS[0]
    return Evidence(measured(claim.checks, values), by_arm, settings.incomparable())


def _column(rows: list[list[float]], k: int) -> list[float]:
    return [row[k] for row in rows]


def draw_costs(evidence: Evidence) -> Figure:
    """The printed training costs within the prediction intervals."""
    return _draw(evidence, "cost", "Training cost", BOOSTCOURSE)


def draw_accuracies(evidence: Evidence) -> Figure:
    """The printed test accuracies within the prediction intervals."""
    printed = {arm: (*[np.nan] * 8, figure) for arm, figure in DEEP10.items()}
    return _draw(evidence, "accuracy", "Test accuracy in percent", printed)


def _draw(evidence: Evidence, what: str, title: str, printed: dict[str, Any]) -> Figure:
    figure, row = figures.panels([f"{title}, {label}" for label in figures.LABELS.values()])
    for axes, (arm, found) in zip(row, evidence.picture.items(), strict=True):
        values = np.transpose(found[what])  # [epochs, R]
        epochs = range(1, len(values) + 1)
        bounds = np.array([interval(column, predicted=True) for column in values])
        color = figures.STYLES[arm]["color"]
        axes.fill_between(epochs, *bounds.T, color=color, alpha=0.25, label="95 % prediction")
        axes.plot(epochs, values.mean(axis=1), color=color, label="mean")
        axes.plot(epochs, printed[arm], "kx", label="printed")
        axes.set_xlabel("epoch")
        axes.legend(frameon=False)
        if what == "cost":
            axes.set_yscale("log")
    return figure


CLAIMS = (
    Claim(
        id="boostcourse-costs",
        statement="The training costs that the boostcourse notebook prints are what its networks "
        "cost.",
        source=Boostcourse.source,
        setup="784-32-32-512, Adam 1e-3, batches of 100, 15 epochs: the preset boostcourse.",
        criterion="The costs of the first and the last epoch lie within the 95 % prediction "
        "interval of the replicates, mean ± t sd sqrt(1 + 1 / n). The figure shows all thirty.",
        checks=tuple(
            predicted(f"training cost, {epoch} epoch, {figures.LABELS[arm]}", costs[k])
            for arm, costs in BOOSTCOURSE.items()
            for epoch, k in (("first", 0), ("last", -1))
        ),
        seconds=(30, 140),
        run=partial(run, Boostcourse()),
        draw=draw_costs,
        remark="Each figure has its own interval: by chance alone, about one run in six misses "
        "one of four.",
    ),
    Claim(
        id="deep10-accuracy",
        statement="The test accuracies that the post on ten hidden layers prints are what its "
        "networks reach.",
        source=Deep10.source,
        setup="Ten hidden layers of 64, Adam 1e-3, batches of 64, 9 epochs: the preset deep10.",
        criterion="They lie within the 95 % prediction interval of the replicates, mean ± "
        "t sd sqrt(1 + 1 / n).",
        checks=tuple(
            predicted(f"test accuracy in %, {figures.LABELS[arm]}", figure)
            for arm, figure in DEEP10.items()
        ),
        seconds=(45, 190),
        run=partial(run, Deep10()),
        draw=draw_accuracies,
    ),
)

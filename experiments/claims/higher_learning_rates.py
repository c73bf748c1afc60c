"""Batch normalization allows learning rates at which a network without it collapses."""

import numpy as np
from matplotlib.figure import Figure

from bnjax import models, paired
from experiments.claims import STYLES, Check, Claim, Evidence, Settings, around, measured
from experiments.lab.grids import ACTIVATION_NAMES, Cell, accuracy, by_cell, epochs_of, train_grid
from experiments.report import figures

STEPS, BATCH, STD = 50_000, 60, 0.05
ARMS = {"no_bn": "without BN", "bn": "with BN"}
PUBLISHED = {  # activation, rate: accuracy without and with batch normalization
    ("relu", 0.01): (97.5, 98.0),
    ("sigmoid", 0.01): (82.7, 97.3),
    ("relu", 1.0): (9.8, 98.3),
    ("relu", 2.0): (10.1, 98.3),
    ("sigmoid", 1.0): (97.5, 98.1),
}


def run(settings: Settings) -> Evidence:
    """Test accuracy in each cell while it trains."""
    full = epochs_of(STEPS, BATCH, settings.train)
    epochs = settings.either(min(4, full), full)
    keys = paired.replicate_keys(settings.seed, settings.count(2, 3))

    def measure(activation: str) -> dict[str, dict[str, list[list[float]]]]:
        rates = [rate for name, rate in PUBLISHED if name == activation]
        cells = [Cell(rate, lambda *_: STD) for rate in rates]
        training = train_grid(
            cells,
            keys,
            settings.train,
            settings.test,
            epochs=epochs,
            batch_size=BATCH,
            hidden_sizes=(100,) * 3,
            activation=models.activation(activation),
        )
        by_epoch = [accuracy(epoch) for epoch in training]
        curves = {
            arm: by_cell(np.stack([found[arm] for found in by_epoch], axis=1), cells).tolist()
            for arm in ARMS
        }  # [rates, R, epochs]
        return {
            f"{ACTIVATION_NAMES[activation]} at {rate:g}": {arm: curves[arm][k] for arm in ARMS}
            for k, rate in enumerate(rates)
        }

    done = measure("relu") | measure("sigmoid")
    curves = {
        cell: done[cell] for cell in (f"{ACTIVATION_NAMES[n]} at {r:g}" for n, r in PUBLISHED)
    }
    last = [[curve[-1] for curve in by_arm[arm]] for by_arm in curves.values() for arm in ARMS]
    told = f"{epochs} of {full} epochs"
    return Evidence(measured(CLAIM.checks, last), curves, settings.incomparable(told))


def draw(evidence: Evidence) -> Figure:
    """Test accuracy over training in each cell."""
    figure, row = figures.panels(list(evidence.picture), width=2.8)
    for axes, by_arm in zip(row, evidence.picture.values(), strict=True):
        for arm, values in by_arm.items():
            epochs = range(1, len(values[0]) + 1)
            figures.draw_band(axes, STYLES[arm], epochs, values, marker="")
        axes.set_xlabel("epoch")
        axes.set_ylim(0, 102)
    row[0].set_ylabel("test accuracy in percent")
    row[0].legend(frameon=False)
    return figure


def _check(cell: str, arm: str, published: float) -> Check:
    quantity = f"test accuracy in %, {cell}, {ARMS[arm]}"
    if published < 25:
        return Check(quantity, f"{published:g}", high=25.0, original=True)
    return around(quantity, published, 4.0 if published == 82.7 else 1.0, original=True)


CLAIM = Claim(
    id="higher-learning-rates",
    statement="Batch normalization trains at learning rates a hundred times higher, at which the "
    "same network without it collapses, and better at low ones.",
    source="Udacity, Deep learning nanodegree, lesson Batch Normalization; Bjorck et al., "
    "Understanding batch normalization (2018), section 3",
    setup=f"784-100-100-100-10, SGD, batches of {BATCH}, normal initial weights of {STD}, no "
    f"initial biases, {STEPS:,} steps; the lesson trains on 55,000 images, here all 60,000 are "
    "used. The lesson also starts both networks from the same weights, and has a momentum of "
    "0.99 and an epsilon of 1e-3.",
    criterion="Mean accuracies are within 1 point of the lesson's (4 for its 82.7), and below 25 % "
    "where the lesson's network collapsed.",
    checks=tuple(
        _check(f"{ACTIVATION_NAMES[name]} at {rate:g}", arm, figure)
        for (name, rate), published in PUBLISHED.items()
        for arm, figure in zip(ARMS, published, strict=True)
    ),
    seconds=(40, 400),
    run=run,
    draw=draw,
    remark="A network whose weights are no longer finite predicts nothing and counts as 0 %; the "
    "lesson's predicts the class 0, of which there are 9.8 %.",
)

"""Batch normalization allows learning rates at which a network without it collapses."""

import numpy as np
from matplotlib.figure import Figure

from bnjax import models
from experiments.claims import LABELS, Check, Claim, Evidence, Settings, around, collect, draw_arms
from experiments.claims.grids import (
    ACTIVATION_NAMES,
    GridPoint,
    accuracy,
    by_point,
    epochs_of,
    train_grid,
)
from experiments.report import figures

STEPS, BATCH, STD = 50_000, 60, 0.05
ARMS = ("no_bn", "bn")
PUBLISHED = {  # activation, rate: accuracy without and with batch normalization
    ("relu", 0.01): (97.5, 98.0),
    ("sigmoid", 0.01): (82.7, 97.3),
    ("relu", 1.0): (9.8, 98.3),
    ("relu", 2.0): (10.1, 98.3),
    ("sigmoid", 1.0): (97.5, 98.1),
}


def _title(activation: str, rate: float) -> str:
    return f"{ACTIVATION_NAMES[activation]} at {rate:g}"


def run(settings: Settings) -> Evidence:
    """Test accuracy at each point while it trains."""
    full = epochs_of(STEPS, BATCH, settings.data()[0])
    epochs = settings.either(min(4, full), full)
    keys = settings.keys(2, 3)
    curves: dict[str, dict[str, np.ndarray]] = {_title(*point): {} for point in PUBLISHED}
    for activation in ("relu", "sigmoid"):
        rates = [rate for name, rate in PUBLISHED if name == activation]
        points = [GridPoint(rate, lambda *_: STD) for rate in rates]
        training = train_grid(
            points,
            keys,
            *settings.data(),
            epochs=epochs,
            batch_size=BATCH,
            hidden_sizes=(100,) * 3,
            activation=models.activation(activation),
        )
        by_epoch = [accuracy(epoch) for epoch in training]
        for arm in ARMS:
            values = by_point(np.stack([found[arm] for found in by_epoch], axis=1), points)
            for rate, curve in zip(rates, values, strict=True):
                curves[_title(activation, rate)][arm] = curve  # [R, epochs]
    last = [curve[:, -1] for by_arm in curves.values() for curve in by_arm.values()]
    told = f"{epochs} of {full} epochs"
    return collect(CLAIM.checks, last, curves, settings.incomparable(told))


def draw(evidence: Evidence) -> Figure:
    """Test accuracy over training at each point."""
    figure, row = figures.panels(list(evidence.picture), width=2.8)
    for axes, by_arm in zip(row, evidence.picture.values(), strict=True):
        epochs = range(1, 1 + len(by_arm["bn"][0]))
        draw_arms(axes, epochs, by_arm, xlabel="epoch", ylim=(0, 102))
    row[0].set_ylabel("test accuracy in percent")
    return figure


def _check(title: str, arm: str, published: float) -> Check:
    quantity = f"test accuracy in %, {title}, {LABELS[arm]}"
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
        _check(_title(*point), arm, figure)
        for point, published in PUBLISHED.items()
        for arm, figure in zip(ARMS, published, strict=True)
    ),
    seconds=(40, 400),
    run=run,
    draw=draw,
    remark="A network whose weights are no longer finite predicts nothing and counts as 0 %; the "
    "lesson's predicts the class 0, of which there are 9.8 %.",
)

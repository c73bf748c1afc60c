"""Batch normalization allows learning rates at which a network without it collapses."""

import math

import numpy as np

from bnjax import models
from experiments.claims import (
    LABELS,
    Check,
    Claim,
    Evidence,
    Settings,
    collect,
    draw_lines,
    grids,
)

STEPS, BATCH, STD = 50_000, 60, 0.05
ARMS = ("no_bn", "bn")
NAMES = {"relu": "ReLU", "sigmoid": "sigmoid"}
PUBLISHED = {  # activation, rate: accuracy without and with batch normalization
    ("relu", 0.01): (97.5, 98.0),
    ("sigmoid", 0.01): (82.7, 97.3),
    ("relu", 1.0): (9.8, 98.3),
    ("relu", 2.0): (10.1, 98.3),
    ("sigmoid", 1.0): (97.5, 98.1),
}


def _title(activation: str, rate: float) -> str:
    return f"{NAMES[activation]} at {rate:g}"


def run(settings: Settings) -> Evidence:
    """Test accuracy at each point while it trains."""
    data = settings.data()
    full = grids.epochs_of(STEPS, BATCH, data[0])
    epochs = settings.either(min(4, full), full)
    keys = settings.keys(2, 3)
    panels: dict[str, dict[str, np.ndarray]] = {_title(*point): {} for point in PUBLISHED}
    for activation in NAMES:
        rates = [rate for name, rate in PUBLISHED if name == activation]
        points = [grids.GridPoint(rate, lambda *_: STD) for rate in rates]
        training = grids.train_grid(
            points,
            keys,
            *data,
            epochs=epochs,
            batch_size=BATCH,
            hidden_sizes=(100,) * 3,
            activation=models.activation(activation),
        )
        by_arm = grids.stack(grids.accuracy(epoch) for epoch in training)
        for arm in ARMS:
            for rate, curve in zip(rates, np.split(by_arm[arm], len(rates)), strict=True):
                panels[_title(activation, rate)][arm] = curve  # [R, epochs]
    last = [curve[:, -1] for by_arm in panels.values() for curve in by_arm.values()]
    incomparable = settings.incomparable(f"{epochs} of {full} epochs")
    return collect(CLAIM.checks, last, panels, incomparable=incomparable)


def _check(title: str, arm: str, published: float) -> Check:
    quantity = f"test accuracy in %, {title}, {LABELS[arm]}"
    reach = 4.0 if published == 82.7 else 1.0
    low, high = (-math.inf, 25.0) if published < 25 else (published - reach, published + reach)
    return Check(quantity, f"{published:g}", low, high, original=True)


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
    checks=tuple(
        _check(_title(*point), arm, figure)
        for point, published in PUBLISHED.items()
        for arm, figure in zip(ARMS, published, strict=True)
    ),
    seconds=(40, 400),
    run=run,
    draw=draw_lines(xlabel="epoch", ylabel="test accuracy in percent", ylim=(0, 102)),
    remark="A network whose weights are no longer finite predicts nothing and counts as 0 %; the "
    "lesson's predicts the class 0, of which there are 9.8 %.",
)

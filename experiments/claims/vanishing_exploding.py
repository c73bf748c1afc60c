"""Four remedies against vanishing and exploding gradients, each on its own."""

from itertools import product
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bnjax import diagnostics, models
from experiments.claims import LABELS, Check, Claim, Evidence, Settings, collect, grids
from experiments.lab.scratch import head
from experiments.report import figures

DEPTH, WIDTH = 10, 64
NAMES = {"relu": "ReLU", "sigmoid": "sigmoid", "tanh": "tanh"}
INITS = {
    "small": lambda *_: 0.01,
    "Xavier": lambda fan_in, fan_out: np.sqrt(2 / (fan_in + fan_out)),
    "He": lambda fan_in, _: np.sqrt(2 / fan_in),
}
RATES = (0.01, 0.1, 1.0)
GRID = list(product(INITS, RATES))
BROKEN = "does not train"
SETTINGS = {  # activation, initial weights, learning rate, arm: what is said of it
    ("sigmoid", "small", 0.1, "no_bn"): BROKEN,
    ("relu", "small", 0.1, "no_bn"): "trains, with another activation",
    ("sigmoid", "Xavier", 0.1, "no_bn"): "trains, with careful initialization",
    ("sigmoid", "small", 0.1, "bn"): "trains, with BN",
    ("relu", "He", 1.0, "no_bn"): BROKEN,
    ("relu", "He", 0.1, "no_bn"): "trains, at a smaller rate",
    ("relu", "He", 1.0, "bn"): "trains, with BN",
}


def _name(activation: str, init: str, rate: float, arm: str) -> str:
    return f"{NAMES[activation]}, {init}, rate {rate:g}, {LABELS[arm]}"


def run(settings: Settings) -> Evidence:
    """Test accuracy of every combination, and the gradient norms of those that the claim names."""
    keys = settings.keys(3, 5)
    data = settings.data(settings.either(20_000, 60_000))
    epochs = grids.epochs_of(settings.either(200, 600), 100, data[0])
    points = [grids.GridPoint(rate, INITS[init]) for init, rate in GRID]
    accuracies: dict[tuple, np.ndarray] = {}
    norms: dict[tuple, np.ndarray] = {}
    for activation in NAMES:
        function = models.activation(activation)
        fields: dict[str, Any] = {"hidden_sizes": (WIDTH,) * DEPTH, "activation": function}
        *_, last = grids.train_grid(points, keys, *data, epochs=epochs, batch_size=100, **fields)
        twins, probe = grids.networks(**fields), head(data[0], 500)
        by_arm = grids.look_into(diagnostics.gradient_norms, twins, last.states, probe)
        for arm, values in grids.accuracy(last).items():
            by_layer = np.stack([by_arm[arm][f"Dense_{k}"] for k in range(DEPTH + 1)], axis=1)
            places = [(activation, *point, arm) for point in GRID]
            accuracies |= zip(places, np.split(values, len(GRID)), strict=True)  # [R]
            norms |= zip(places, np.split(by_layer, len(GRID)), strict=True)  # [R, layers]
    panels = {
        "accuracy": {
            arm: [accuracies[name, *point, arm] for name, point in product(NAMES, GRID)]
            for arm in LABELS
        },
        "norms": {_name(*setting): norms[setting] for setting in SETTINGS},
    }
    return collect(CLAIM.checks, [accuracies[setting] for setting in SETTINGS], panels)


def draw(evidence: Evidence) -> Figure:
    """Accuracy as heat maps, and gradient norms by layer."""
    titles = (*(f"Test accuracy {label}" for label in LABELS.values()), "Gradient norm")
    figure, (*maps, right) = figures.panels(titles)
    accuracy, norms = evidence.picture["panels"].values()
    rows = [f"{name}, {init}" for name, init in product(NAMES.values(), INITS)]
    for axes, values in zip(maps, accuracy.values(), strict=True):
        table = np.mean(values, axis=1).reshape(len(rows), -1)
        axes.imshow(table, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        for (y, x), percent in np.ndenumerate(table):
            color = "black" if percent > 60 else "white"
            axes.text(x, y, f"{percent:.0f}", ha="center", va="center", color=color)
        axes.set_xticks(range(len(RATES)), [f"{rate:g}" for rate in RATES])
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlabel("learning rate")
    styles = figures.arm_styles({name: name for name in norms})
    for name, values in norms.items():
        figures.draw_band(right, styles[name], range(1, DEPTH + 2), values)
    right.set(xlabel="layer, from the input on, after training", yscale="log")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def _check(setting: tuple[str, str, float, str], said: str) -> Check:
    quantity = f"test accuracy in %, {_name(*setting)}"
    return Check(quantity, said, high=25.0) if said == BROKEN else Check(quantity, said, low=50.0)


CLAIM = Claim(
    id="vanishing-exploding",
    statement="Vanishing gradients are cured by another activation, careful initialization or "
    "batch normalization; exploding ones by a small learning rate or batch normalization.",
    source="boostcourse and Lab 10 notebooks, Gradient vanishing / exploding: solutions",
    setup=f"{DEPTH} hidden layers of {WIDTH}, 600 steps of SGD on batches of 100 (quick: 200); all "
    "combinations of sigmoid, tanh, ReLU, normal initial weights of 0.01, Xavier's, He's, and "
    f"learning rates {', '.join(f'{rate:g}' for rate in RATES)}, with batch normalization or not.",
    checks=tuple(_check(*pair) for pair in SETTINGS.items()),
    seconds=(50, 100),
    run=run,
    draw=draw,
    remark="Whether one remedy suffices depends on what else is wrong, as the maps show.",
)

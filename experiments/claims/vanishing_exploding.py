"""Four remedies against vanishing and exploding gradients, each on its own."""

import math
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from bnjax import diagnostics, models, paired
from bnjax.training import Batch
from experiments.claims import LABELS, STYLES, Check, Claim, Evidence, Settings, collect, grids
from experiments.claims.grids import ACTIVATION_NAMES, GridPoint, by_point
from experiments.lab.scratch import head
from experiments.report import figures

DEPTH, WIDTH = 10, 64
INITS = {
    "small": lambda *_: 0.01,
    "Xavier": lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out)),
    "He": grids.he_std,
}
RATES = (0.01, 0.1, 1.0)
GRID = list(product(INITS, RATES))
DRAWN = (
    ("sigmoid", "small", "no_bn", "--"),
    ("sigmoid", "Xavier", "no_bn", ":"),
    ("relu", "He", "no_bn", "-"),
    ("sigmoid", "small", "bn", "-"),
)
LAYERS = [f"Dense_{k}" for k in range(DEPTH + 1)]


def run(settings: Settings) -> Evidence:
    """Gradient norms of every combination before and after training, and test accuracy."""
    keys = settings.keys(3, 5)
    data = settings.data(settings.either(20_000, 60_000))
    epochs = grids.epochs_of(settings.either(200, 600), 100, data[0])
    points = [GridPoint(rate, INITS[init]) for init, rate in GRID]

    def measure(activation: str) -> dict[str, dict[str, np.ndarray]]:
        sizes, function = (WIDTH,) * DEPTH, models.activation(activation)
        fields: dict[str, Any] = {"hidden_sizes": sizes, "activation": function}
        found: dict[str, dict[str, np.ndarray]] = {arm: {} for arm in LABELS}

        def look(when: str, states: paired.States) -> None:
            for arm, module in grids.networks(**fields).items():
                norms = _gradient_norms(module, states[arm].variables, head(data[0], 500))
                found[arm][when] = np.exp(by_point(np.log(norms), points).mean(axis=1))

        before = partial(look, "before")
        *_, last = grids.train_grid(
            points, keys, *data, epochs=epochs, batch_size=100, at_start=before, **fields
        )
        look("after", last.states)
        for arm, values in grids.accuracy(last).items():
            found[arm]["accuracy"] = by_point(values, points)
        return found

    by_activation = {name: measure(name) for name in ACTIVATION_NAMES}
    values = [
        by_activation[activation][arm]["accuracy"][GRID.index((init, rate))]
        for activation, init, rate, arm in SETTINGS
    ]
    return collect(CLAIM.checks, values, by_activation)


@partial(jax.jit, static_argnums=0)
def _gradient_norms(model: models.MLP, variables: diagnostics.Variables, batch: Batch) -> jax.Array:
    """`[C R, layers]`; at least the smallest positive float32."""

    def one(variables: diagnostics.Variables) -> jax.Array:
        norms = diagnostics.gradient_norms(model, variables, batch)
        return jnp.stack([norms[layer] for layer in LAYERS])

    return jnp.maximum(jax.lax.map(one, variables), jnp.finfo(jnp.float32).tiny)


def draw(evidence: Evidence) -> Figure:
    """Accuracy as a heat map, and the gradient norms of the vanishing network and its remedies."""
    titles = ("Without BN", "With BN", "Gradient norm before training", "... after training")
    figure, row = figures.panels(titles, width=3.6)
    names = list(ACTIVATION_NAMES)
    ticks = [f"{ACTIVATION_NAMES[name]}, {init}" for name in names for init in INITS]
    for axes, arm in zip(row, ("no_bn", "bn"), strict=False):
        means = [np.mean(evidence.picture[name][arm]["accuracy"], axis=1) for name in names]
        table = np.reshape(means, (-1, len(RATES)))
        axes.imshow(table, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        for (y, x), value in np.ndenumerate(table):
            ink: dict[str, Any] = {"color": "black" if value > 60 else "white", "fontsize": 8}
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", **ink)
        axes.set_xticks(range(len(RATES)), [f"{rate:g}" for rate in RATES])
        axes.set_yticks(range(len(ticks)), ticks if arm == "no_bn" else [])
        axes.set_xlabel("learning rate; test accuracy in percent")
    for axes, when in zip(row[2:], ("before", "after"), strict=True):
        for name, init, arm, style in DRAWN:
            norms = evidence.picture[name][arm][when][GRID.index((init, 0.1))]
            label = f"{ACTIVATION_NAMES[name]}, {init}, {LABELS[arm]}"
            color = STYLES[arm]["color"]
            axes.semilogy(range(1, DEPTH + 2), norms, style, color=color, label=label)
        axes.set(xlabel="layer, from the input on; learning rate 0.1")
        axes.sharey(row[2])
    row[2].legend(frameon=False, fontsize=7)
    return figure


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


def _check(setting: tuple[str, str, float, str], said: str) -> Check:
    name, init, rate, arm = setting
    title = f"{ACTIVATION_NAMES[name]}, {init}, rate {rate:g}"
    quantity = f"test accuracy in %, {title}, {LABELS[arm]}"
    return Check(quantity, said, high=25.0) if said == BROKEN else Check(quantity, said, low=50.0)


CLAIM = Claim(
    id="vanishing-exploding",
    statement="Vanishing gradients are cured by another activation, by careful initialization, "
    "or by batch normalization; exploding ones by a small learning rate or by batch "
    "normalization.",
    source="boostcourse and Lab 10 notebooks, Gradient vanishing / exploding: solutions",
    setup=f"{DEPTH} hidden layers of {WIDTH}, 600 steps of SGD on batches of 100 (quick: "
    "200), every combination of sigmoid, tanh, ReLU; normal initial weights of 0.01, "
    f"Xavier's, He's; learning rates {', '.join(f'{rate:g}' for rate in RATES)}; with and without "
    "batch normalization.",
    criterion="A network that does not train (mean test accuracy below 25 %) does so (50 % or "
    "more) with each single remedy: sigmoid and small weights at 0.1, ReLU and He's weights at 1.",
    checks=tuple(_check(*pair) for pair in SETTINGS.items()),
    seconds=(50, 100),
    run=run,
    draw=draw,
    remark="Whether one remedy suffices depends on what else is wrong: the map has all "
    "combinations.",
)

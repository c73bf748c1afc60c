"""Figure 1 of the paper: sooner and higher accuracy, and steadier inputs of the last sigmoid."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from bnjax import diagnostics, models
from bnjax.training import Batch
from experiments.claims import LABELS, STYLES, Check, Claim, Evidence, Settings, collect, draw_arms
from experiments.claims.grids import GridPoint, accuracy, epochs_of, networks, train_grid
from experiments.lab.scratch import head
from experiments.report import figures

STEPS, BATCH, RATE, STD = 50_000, 60, 0.1, 0.1
FIELDS: dict[str, Any] = {"hidden_sizes": (100,) * 3, "activation": models.activation("sigmoid")}


def run(settings: Settings) -> Evidence:
    """Accuracy and percentiles after every epoch of 1,000 steps."""
    data = settings.data()
    full = epochs_of(STEPS, BATCH, data[0])
    epochs = settings.either(min(10, full), full)
    keys = settings.keys(3, 5)
    points = [GridPoint(RATE, lambda *_: STD)]
    found: list[tuple[dict, dict]] = []
    for epoch in train_grid(points, keys, *data, epochs=epochs, batch_size=BATCH, **FIELDS):
        inputs = {
            arm: np.asarray(_percentiles(arm, state.variables, head(data[1], 1000)))
            for arm, state in epoch.states.items()
        }
        found.append((accuracy(epoch), inputs))
    accuracies, percentiles = (
        {arm: np.stack([by_arm[arm] for by_arm in by_epoch], axis=1) for arm in LABELS}
        for by_epoch in zip(*found, strict=True)
    )  # [R, epochs], [R, epochs, 3, H]
    steps = len(data[0].labels) // BATCH
    picture = {
        "steps": [steps * number for number in range(1, epochs + 1)],
        "accuracy": accuracies,
        "unit": {arm: values[0, :, :, 0].round(4) for arm, values in percentiles.items()},
    }
    return collect(CLAIM.checks, _compare(accuracies, percentiles), picture)


@partial(jax.jit, static_argnums=0)
def _percentiles(arm: str, variables: diagnostics.Variables, batch: Batch) -> jax.Array:
    model = networks(**FIELDS)[arm]

    def of_replicate(variables: diagnostics.Variables) -> jax.Array:
        entering = diagnostics.preactivations(model, variables, batch)["preactivations_3"]
        return jnp.percentile(entering, jnp.array([15, 50, 85]), axis=0)

    return jax.lax.map(of_replicate, variables)


def _compare(
    accuracies: dict[str, np.ndarray], percentiles: dict[str, np.ndarray]
) -> list[np.ndarray]:
    bn, no_bn = accuracies["bn"], accuracies["no_bn"]  # [R, epochs]
    levels = np.maximum.accumulate(no_bn, axis=1)
    ratios = _first(bn, levels) / _first(no_bn, levels)
    raw, relative = {}, {}
    for arm, values in percentiles.items():  # [R, epochs, 3, H]
        drift = np.ptp(values, axis=1)
        spread = (values[:, :, 2] - values[:, :, 0]).mean(axis=1)
        raw[arm] = drift.mean(axis=(1, 2))
        relative[arm] = (drift / spread[:, None]).mean(axis=(1, 2))
    return [
        ratios.max(axis=1),
        ratios[:, -1],
        bn[:, -1] - no_bn[:, -1],
        raw["bn"] / raw["no_bn"],
        relative["bn"] / relative["no_bn"],
    ]


def _first(accuracy: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The first epoch of each replicate to reach each of its levels, or one more than there are."""
    reached = accuracy[:, None] >= levels[:, :, None]  # [R, levels, epochs]
    return np.where(reached.any(axis=2), reached.argmax(axis=2) + 1, 1 + reached.shape[2])


def draw(evidence: Evidence) -> Figure:
    """The three panels of the paper's figure."""
    titles = ("(a) Test accuracy", "(b) Without BN", "(c) With BN")
    figure, (first, *others) = figures.panels(titles)
    steps = np.array(evidence.picture["steps"]) / 1000
    accuracies = evidence.picture["accuracy"]
    lowest = min(75, *np.ravel([*accuracies.values()]))
    draw_arms(first, steps, accuracies, ylabel="percent", ylim=(lowest, None))
    for axes, arm in zip(others, ("no_bn", "bn"), strict=True):
        for line, style in zip(np.transpose(evidence.picture["unit"][arm]), "-~-", strict=True):
            width = 2.2 if style == "~" else 1.0
            axes.plot(steps, line, color=STYLES[arm]["color"], linewidth=width)
        axes.sharey(others[0])
    others[0].set_ylabel("15th, 50th, 85th percentile of a last unit's input")
    for axes in (first, *others):
        axes.set_xlabel("thousand steps")
    return figure


CLAIM = Claim(
    id="paper-figure-1",
    statement="Batch normalization trains faster and to a higher accuracy, and makes the "
    "distribution of the inputs of a sigmoid more stable while training goes on.",
    source="Ioffe & Szegedy (2015), section 4.1 and figure 1; Santurkar et al. (2018), section "
    "2, doubt that the inputs get steadier",
    setup=f"784-100-100-100-10, sigmoid, normal initial weights of {STD}, batches of {BATCH}, "
    f"{STEPS:,} steps of SGD. The paper gives neither the learning rate, here {RATE}, nor the "
    "scale of the weights. Drift is the range of a percentile over training, after the first "
    "epoch, averaged over the 15th, 50th and 85th of all 100 units of the last hidden layer, as "
    "1,000 test images see them.",
    criterion="Evaluated every 1,000 steps: with batch normalization, in every replicate no "
    "accuracy that the network without it reaches takes more steps, and its best takes fewer; "
    "the last accuracy is higher; the drift is smaller, as the paper draws it and in units of "
    "each unit's own spread.",
    checks=(
        Check("steps to any accuracy, largest ratio", "never later", high=1.0, rule="each"),
        Check("steps to the best accuracy without BN, ratio", "below 1", high=1.0),
        Check("last test accuracy, difference in points", "above 0", low=0.0),
        Check("drift of the percentiles, ratio with BN to without", "below 1", high=1.0),
        Check("drift in units of the spread, ratio", "below 1", high=1.0),
    ),
    seconds=(20, 180),
    run=run,
    draw=draw,
)

"""Figure 1 of the paper: sooner and higher accuracy, and steadier inputs of the last sigmoid."""

from functools import partial
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from bnjax import diagnostics, models, paired
from bnjax.training import Batch
from experiments.claims import STYLES, Check, Claim, Evidence, Settings, measured
from experiments.lab.grids import Cell, accuracy, epochs_of, networks, take, train_grid
from experiments.report import figures

STEPS, BATCH, RATE, STD = 50_000, 60, 0.1, 0.1
FIELDS: dict[str, Any] = {"hidden_sizes": (100,) * 3, "activation": models.activation("sigmoid")}


def run(settings: Settings) -> Evidence:
    """Accuracy and percentiles after every epoch of 1,000 steps."""
    full = epochs_of(STEPS, BATCH, settings.train)
    epochs = settings.either(min(10, full), full)
    keys = paired.replicate_keys(settings.seed, settings.count(3, 5))
    probe = take(settings.test, 1000)
    found: dict[str, dict[str, list]] = {
        arm: {"accuracy": [], "percentiles": []} for arm in networks()
    }
    for epoch in train_grid(
        [Cell(RATE, lambda *_: STD)],
        keys,
        settings.train,
        settings.test,
        epochs=epochs,
        batch_size=BATCH,
        **FIELDS,
    ):
        for arm, values in accuracy(epoch).items():
            percentiles = _percentiles(arm, epoch.states[arm].variables, probe)  # [R, 3, H]
            found[arm]["accuracy"].append(values)
            found[arm]["percentiles"].append(np.asarray(percentiles))
    by_arm = {
        arm: {what: np.stack(values, axis=1) for what, values in of_arm.items()}
        for arm, of_arm in found.items()
    }  # [R, epochs, ...]
    steps = len(settings.train.labels) // BATCH
    picture = {
        "steps": [steps * number for number in range(1, epochs + 1)],
        "accuracy": {arm: found["accuracy"].tolist() for arm, found in by_arm.items()},
        "unit": {
            arm: found["percentiles"][0, :, :, 0].round(4).tolist() for arm, found in by_arm.items()
        },
    }
    return Evidence(measured(CLAIM.checks, _compare(by_arm)), picture)


@partial(jax.jit, static_argnums=0)
def _percentiles(arm: str, variables: diagnostics.Variables, batch: Batch) -> jax.Array:
    model = networks(**FIELDS)[arm]

    def of_replicate(variables: diagnostics.Variables) -> jax.Array:
        return diagnostics.activation_percentiles(model, variables, batch)["percentiles_3"]

    return jax.lax.map(of_replicate, variables)


def _compare(by_arm: dict[str, dict[str, np.ndarray]]) -> list[np.ndarray]:
    bn, no_bn = by_arm["bn"]["accuracy"], by_arm["no_bn"]["accuracy"]  # [R, epochs]
    levels = np.maximum.accumulate(no_bn, axis=1)
    ratios = _first(bn, levels) / _first(no_bn, levels)
    drift = {arm: np.ptp(found["percentiles"], axis=1) for arm, found in by_arm.items()}
    spread = {
        arm: (found["percentiles"][:, :, 2] - found["percentiles"][:, :, 0]).mean(axis=1)
        for arm, found in by_arm.items()
    }  # [R, H]
    raw = {arm: values.mean(axis=(1, 2)) for arm, values in drift.items()}
    relative = {
        arm: (values / spread[arm][:, None]).mean(axis=(1, 2)) for arm, values in drift.items()
    }
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
    for arm, values in evidence.picture["accuracy"].items():
        figures.draw_band(first, STYLES[arm], steps, values, marker="")
    first.set_ylabel("percent")
    first.set_ylim(bottom=min(75, *np.ravel([*evidence.picture["accuracy"].values()])))
    first.legend(frameon=False)
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

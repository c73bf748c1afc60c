"""Figure 1 of the paper: sooner and higher accuracy, and steadier inputs of the last sigmoid."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from bnjax import diagnostics, models
from bnjax.diagnostics import Variables
from bnjax.training import Batch
from experiments.claims import LABELS, Check, Claim, Evidence, Settings, collect, draw_lines, grids
from experiments.lab.scratch import head

STEPS, BATCH, RATE, STD = 50_000, 60, 0.1, 0.1
PERCENTILES = ("15th", "50th", "85th")
FIELDS: dict[str, Any] = {"hidden_sizes": (100,) * 3, "activation": models.activation("sigmoid")}


def run(settings: Settings) -> Evidence:
    """Accuracy and percentiles after every epoch of 1,000 steps."""
    data = settings.data()
    full = grids.epochs_of(STEPS, BATCH, data[0])
    epochs = settings.either(min(10, full), full)
    keys, points = settings.keys(3, 5), [grids.GridPoint(RATE, lambda *_: STD)]
    training = grids.train_grid(points, keys, *data, epochs=epochs, batch_size=BATCH, **FIELDS)
    twins, seen = grids.networks(**FIELDS), head(data[1], 1000)
    accuracies, percentiles = grids.stack(
        (grids.accuracy(epoch), grids.look_into(_percentiles, twins, epoch.states, seen))
        for epoch in training
    )  # [R, epochs], [R, epochs, 3, H]
    panels = {"(a) Test accuracy in percent": accuracies}
    for title, arm in (("(b) A unit's input, no BN", "no_bn"), ("(c) ... with BN", "bn")):
        lines = np.moveaxis(percentiles[arm][:1, :, :, 0], -1, 0)  # of the first replicate
        panels[title] = dict(zip(PERCENTILES, lines, strict=True))
    return collect(CLAIM.checks, _compare(accuracies, percentiles), panels)


def _percentiles(model: models.MLP, variables: Variables, batch: Batch) -> jax.Array:
    entering = diagnostics.preactivations(model, variables, batch)["preactivations_3"]
    return jnp.percentile(entering, jnp.array([15, 50, 85]), axis=0)


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
    labels = LABELS | {name: f"{name} percentile" for name in PERCENTILES}
    figure = draw_lines(labels, xlabel="epoch, 1,000 steps of MNIST")(evidence)
    figure.axes[2].sharey(figure.axes[1])
    return figure


CLAIM = Claim(
    id="paper-figure-1",
    statement="Batch normalization trains faster and to a higher accuracy, and makes the "
    "distribution of the inputs of a sigmoid more stable while training goes on.",
    source="Ioffe & Szegedy (2015), section 4.1 and figure 1; Santurkar et al. (2018), section "
    "2, doubt that the inputs get steadier",
    setup=f"784-100-100-100-10, sigmoid, normal initial weights of {STD}, batches of {BATCH}, "
    f"{STEPS:,} steps of SGD, evaluated every 1,000. The paper gives neither the learning rate, "
    f"here {RATE}, nor the scale of the weights. Steps are counted to each accuracy that the "
    "network without batch normalization reaches. Drift is the range of a percentile over "
    "training, after the first epoch, averaged over the 15th, 50th and 85th of all 100 units of "
    "the last hidden layer, as 1,000 test images see them; spread is from the 15th to the 85th.",
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

"""Batch normalization widens the range of initial scales from which a network trains."""

import numpy as np

from experiments.claims import Check, Claim, Evidence, Settings, collect, draw_lines, grids

SCALES = np.logspace(0, -4, 16)
EXAMPLES, EPOCHS = 1000, 20


def run(settings: Settings) -> Evidence:
    """Training accuracy from each scale."""
    points = [grids.GridPoint(0.01, lambda *_, scale=scale: scale) for scale in SCALES]
    few, _ = settings.data(EXAMPLES)
    keys = settings.keys(3, 20)
    *_, last = grids.train_grid(
        points, keys, few, few, epochs=EPOCHS, batch_size=100, hidden_sizes=(100,) * 5
    )
    accuracy = {
        arm: np.reshape(np.asarray(m.correct) / np.asarray(m.examples), (len(points), -1))
        for arm, m in last.train.items()
    }  # [scales, R]
    best = np.maximum(accuracy["bn"].max(axis=0), accuracy["no_bn"].max(axis=0))
    good = {arm: (values >= 0.9 * best).sum(axis=0) for arm, values in accuracy.items()}
    values = (good["bn"] - 2 * good["no_bn"], good["bn"], good["no_bn"])
    curves = {arm: 100 * values.T for arm, values in accuracy.items()}  # [R, scales]
    panels = {"Training accuracy in percent": curves}
    return collect(CLAIM.checks, values, panels, SCALES)


CLAIM = Claim(
    id="initialization-window",
    statement="With batch normalization, a network learns from far more scales of initial weights.",
    source="CS231n, assignment 2, BatchNormalization; Deep Learning from Scratch, section 6.3.2",
    setup=f"{EXAMPLES:,} training images, five hidden layers of 100, ReLU, SGD 0.01, batches of "
    f"100, {EPOCHS} epochs, 16 standard deviations from 1 to 1e-4. A scale is good if training "
    "accuracy is within 10 % of the best of both networks and all scales. The sources show curves.",
    checks=(
        Check("good scales with BN, less twice those without", "many more", low=0.0),
        Check("good scales of 16, with BN", ""),
        Check("good scales of 16, without BN", ""),
    ),
    seconds=(15, 70),
    run=run,
    draw=draw_lines(xlabel="standard deviation of the initial weights", xscale="log"),
)

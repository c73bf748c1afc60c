"""The figures that two notebooks printed for their one run, among replicates of it."""

from functools import partial

import numpy as np
from matplotlib.figure import Figure

from experiments.claims import LABELS, Claim, Evidence, Settings, collect, interval, predicted
from experiments.lab.arms import make_arms
from experiments.lab.presets import NOTEBOOKS, PRESETS
from experiments.lab.scratch import curves, train
from experiments.report import figures

_PRINTED = {  # training cost of each epoch, as printed
    "bn": "1.206316 .196750 .143228 .114739 .098050 .086919 .079303 .072444 .068416 .061566 "
    ".057881 .055001 .051884 .049083 .047859",
    "no_bn": ".948875 .295372 .240833 .201998 .174786 .156808 .142556 .131019 .122854 .115048 "
    ".108034 .102573 .096396 .091615 .087302",
}
COSTS = {arm: [float(cost) for cost in costs.split()] for arm, costs in _PRINTED.items()}
ACCURACIES = {"bn": [97.83], "no_bn": [95.98]}  # of the last epoch


def run(preset: str, settings: Settings) -> Evidence:
    """Training costs or test accuracies of a preset, epoch by epoch."""
    experiment = PRESETS[preset]
    by_epoch = train(
        make_arms(experiment),
        settings.keys(3, 20),
        *settings.data(),
        epochs=experiment.epochs,
        batch_size=experiment.batch_size,
        drop_last=experiment.drop_last,
    )
    by_arm = curves(by_epoch, experiment.arms)  # [epochs, R]
    if preset == "deep10":
        claim, title, printed = ACCURACY, "Test accuracy in percent", ACCURACIES
        found = {arm: 100 * by_arm[arm]["test_accuracy"] for arm in LABELS}
        values = [found[arm][-1] for arm in LABELS]
    else:
        claim, title, printed = COST, "Training cost", COSTS
        found = {arm: by_arm[arm]["train_cost"] for arm in LABELS}
        values = [found[arm][k] for arm in LABELS for k in (0, -1)]
    panels = {
        f"{title}, {label}": {"measured": found[arm], "printed": printed[arm]}
        for arm, label in LABELS.items()
    }
    return collect(claim.checks, values, panels, incomparable=settings.incomparable())


def draw(yscale: str, evidence: Evidence) -> Figure:
    """The printed figures within the prediction intervals."""
    panels = evidence.picture["panels"]
    figure, row = figures.panels(list(panels))
    for axes, found in zip(row, panels.values(), strict=True):
        values = np.array(found["measured"], np.float64)  # [epochs, R]
        epochs = range(1, len(values) + 1)
        bounds = np.array([interval(of_epoch, predicted=True) for of_epoch in values])
        axes.fill_between(epochs, *bounds.T, alpha=0.25, label="95 % prediction")
        axes.plot(epochs, values.mean(axis=1), label="mean")
        axes.plot(epochs[-len(found["printed"]) :], found["printed"], "kx", label="printed")
        axes.set(xlabel="epoch", yscale=yscale)
        axes.legend()
    return figure


COST = Claim(
    id="boostcourse-costs",
    statement="The training costs that the boostcourse notebook prints are what its networks cost.",
    source=NOTEBOOKS["boostcourse"]["source"],
    setup="784-32-32-512, Adam 1e-3, batches of 100, 15 epochs: the preset boostcourse.",
    checks=tuple(
        predicted(f"training cost, {epoch} epoch, {LABELS[arm]}", costs[k])
        for arm, costs in COSTS.items()
        for epoch, k in (("first", 0), ("last", -1))
    ),
    seconds=(30, 140),
    run=partial(run, "boostcourse"),
    draw=partial(draw, "log"),
    remark="By chance alone, about one run in six misses one of the four intervals.",
)

ACCURACY = Claim(
    id="deep10-accuracy",
    statement="The test accuracies that the post on ten layers prints are what its networks reach.",
    source=NOTEBOOKS["deep10"]["source"],
    setup="Ten hidden layers of 64, Adam 1e-3, batches of 64, 9 epochs: the preset deep10.",
    checks=tuple(
        predicted(f"test accuracy in %, {LABELS[arm]}", figure)
        for arm, (figure,) in ACCURACIES.items()
    ),
    seconds=(45, 190),
    run=partial(run, "deep10"),
    draw=partial(draw, "linear"),
)

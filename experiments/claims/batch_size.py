"""Batch normalization suffers from small batches, and what is offered against it."""

import numpy as np
import optax
from matplotlib.figure import Figure

from bnjax import models, paired
from bnjax.paired import Arm
from experiments.claims import STYLES, Check, Claim, Evidence, Settings, measured
from experiments.lab.grids import accuracy, take, train
from experiments.report import figures

SIZES = (2, 4, 8, 16, 32)
LARGEST = SIZES[-1]
RATE = 0.1
KINDS = {
    "bn": "BN",
    "no_bn": "without BN",
    "renorm": "batch renormalization",
    "ghost": f"ghost BN, batches of {LARGEST}",
}


def run(settings: Settings) -> Evidence:
    """Test accuracy of each kind of network at each size of the batch."""
    keys = paired.replicate_keys(settings.seed, settings.count(4, 10))
    examples = take(settings.train, settings.either(5_000, 10_000))

    def measure(kind: str, size: int) -> np.ndarray:
        batch = LARGEST if kind == "ghost" else size
        *_, last = train(
            [Arm(kind, _network(kind, size), optax.sgd(RATE * batch / LARGEST))],
            keys,
            examples,
            settings.test,
            epochs=settings.either(3, 10),
            batch_size=batch,
        )
        return accuracy(last)[kind]

    sizes = settings.either((2, 8, 32), SIZES)
    found = {f"{kind} {size}": measure(kind, size) for kind in KINDS for size in sizes}
    few, many = SIZES[0], LARGEST
    values = (
        found[f"bn {few}"] - found[f"bn {many}"],
        (found[f"bn {few}"] - found[f"no_bn {few}"])
        - (found[f"bn {many}"] - found[f"no_bn {many}"]),
        found[f"ghost {few}"] - found[f"ghost {many}"],
        found[f"renorm {few}"] - found[f"bn {few}"],
    )
    curves = {kind: [found[f"{kind} {size}"].tolist() for size in sizes] for kind in KINDS}
    return Evidence(measured(CLAIM.checks, values), {"sizes": sizes, "curves": curves})


def _network(kind: str, size: int) -> models.MLP:
    norms = {"bn": "batch", "no_bn": None, "renorm": "renorm", "ghost": f"ghost({size})"}
    return models.MLP((100, 100), 10, norms[kind])


def draw(evidence: Evidence) -> Figure:
    """Accuracy by batch size."""
    figure, (axes,) = figures.panels(["Test accuracy"], width=7)
    colors = {"renorm": "#1b7f5c", "ghost": "#7b3f98"}
    sizes = evidence.picture["sizes"]
    for kind, values in evidence.picture["curves"].items():
        arm = kind if kind in STYLES else "bn"
        style = {"color": colors[kind], "marker": "^"} if kind in colors else {}
        figures.draw_band(
            axes, STYLES[arm], sizes, np.transpose(values), label=KINDS[kind], **style
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("examples that share statistics")
    axes.set_ylabel("percent")
    axes.legend(frameon=False)
    return figure


CLAIM = Claim(
    id="batch-size",
    statement="Batch normalization gets worse as batches shrink to 2; batch renormalization helps.",
    source="CS231n, assignment 2, BatchNormalization; Wu & He, Group normalization (2018), "
    "figure 1; Hoffer et al. (2017) for ghost batches; Ioffe, Batch renormalization (2017), "
    "section 4",
    setup="784-100-100-10, ReLU, SGD with a learning rate proportional to the batch (0.1 for "
    "32), 10 epochs of 10,000 training images (quick: 3 of 5,000). Ghost batch normalization "
    "keeps batches of 32 and normalizes parts of them. The sources use convolutional networks.",
    criterion="Means over replicates: accuracy at 2 is lower than at 32; so is its lead over the "
    "network without batch normalization; the same for ghost batches of 2 and 32; "
    "renormalization at 2 is better than plain batch normalization.",
    checks=(
        Check("BN, test accuracy at 2 minus at 32, points", "below 0", high=0.0),
        Check("BN's lead over no BN, at 2 minus at 32, points", "below 0", high=0.0),
        Check("ghost BN, at 2 minus at 32, points", "below 0", high=0.0),
        Check("at 2, renormalization minus BN, points", "above 0", low=0.0),
    ),
    seconds=(45, 160),
    run=run,
    draw=draw,
)

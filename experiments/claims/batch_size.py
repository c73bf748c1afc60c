"""Batch normalization suffers from small batches, and what is offered against it."""

import numpy as np
import optax

from bnjax import models
from bnjax.paired import Arm
from experiments.claims import Check, Claim, Evidence, Settings, collect, draw_lines
from experiments.claims.grids import accuracy, stack
from experiments.lab.scratch import train

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
    keys = settings.keys(4, 10)
    data = settings.data(settings.either(5_000, 10_000))
    sizes = settings.either((2, 8, 32), SIZES)

    def measure(kind: str, size: int) -> np.ndarray:
        norms = {"bn": "batch", "no_bn": None, "renorm": "renorm", "ghost": f"ghost({size})"}
        batch = LARGEST if kind == "ghost" else size
        network = models.MLP((100, 100), 10, norms[kind])
        arm = Arm(kind, network, optax.sgd(RATE * batch / LARGEST))
        *_, last = train([arm], keys, *data, epochs=settings.either(3, 10), batch_size=batch)
        return accuracy(last)[kind]

    curves = stack({kind: measure(kind, size) for kind in KINDS} for size in sizes)  # [R, sizes]
    change = {kind: values[:, 0] - values[:, -1] for kind, values in curves.items()}
    gain = curves["renorm"][:, 0] - curves["bn"][:, 0]
    values = (change["bn"], change["bn"] - change["no_bn"], change["ghost"], gain)
    panels = {"Test accuracy in percent": curves}
    return collect(CLAIM.checks, values, panels, [str(size) for size in sizes])


CLAIM = Claim(
    id="batch-size",
    statement="Batch normalization gets worse as batches shrink to 2; batch renormalization helps.",
    source="CS231n, assignment 2, BatchNormalization; Wu & He, Group normalization (2018), "
    "figure 1; Hoffer et al. (2017) for ghost batches; Ioffe, Batch renormalization (2017), "
    "section 4",
    setup="784-100-100-10, ReLU, SGD with a learning rate proportional to the batch (0.1 for "
    "32), 10 epochs of 10,000 training images (quick: 3 of 5,000). Ghost batch normalization "
    "keeps batches of 32 and normalizes parts of them. The sources use convolutional networks.",
    checks=(
        Check("BN, test accuracy at 2 minus at 32, points", "below 0", high=0.0),
        Check("BN's lead over no BN, at 2 minus at 32, points", "below 0", high=0.0),
        Check("ghost BN, at 2 minus at 32, points", "below 0", high=0.0),
        Check("at 2, renormalization minus BN, points", "above 0", low=0.0),
    ),
    seconds=(45, 160),
    run=run,
    draw=draw_lines(labels=KINDS, xlabel="examples that share statistics"),
)

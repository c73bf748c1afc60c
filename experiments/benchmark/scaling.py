"""How the time of a step grows with the virtual devices of the CPU over which batches are spread.

README says what devices send to each other in a step, and predicts the time on a cluster from that.
"""

import os
from functools import partial
from typing import Any

import jax

from bnjax.data import Dataset
from experiments.benchmark.epoch import Contender, Epoch, bnjax, measure
from experiments.benchmark.turns import Part, timing

BATCH = 512


def run(dataset: Dataset, repeats: int) -> Part:
    """Measures every layout, each in its process."""
    epochs = measure(LAYOUTS, dataset, repeats)
    steps = len(dataset.train_labels) // BATCH
    seconds = {name: [epoch / steps for epoch in of_one] for name, of_one in epochs.items()}
    rows = [{"devices": name, **timing(of_one, "ms")} for name, of_one in seconds.items()]
    title = f"A step of boostcourse, normalized, on a batch of {BATCH}"
    return {"seconds_per_step": seconds}, title, rows


def spread(dataset: Dataset, count: int, arm: str = "bn", **settings: Any) -> Epoch:
    """A contender whose batches so many devices share."""
    os.environ["XLA_FLAGS"] = ""
    jax.config.update("jax_platforms", "cpu")
    mesh = f"replicate=1,data={count}"
    return bnjax(dataset, mesh=mesh, arms=(arm,), batch_size=BATCH, **settings)


LAYOUTS: dict[str, Contender] = {
    **{str(count): partial(spread, count=count) for count in (1, 2, 4, 8)},
    "8, local statistics": partial(spread, count=8, bn_statistics="local"),
    "8, no batch normalization": partial(spread, count=8, arm="no_bn"),
}

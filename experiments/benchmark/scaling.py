"""How the time of a step grows with devices and processes.

A child process, or several that JAX's distributed runtime joins, trains the network of boostcourse
with batch normalization on one mesh. README says what devices send to each other in a step, and how
to predict the time on a cluster from that.
"""

import dataclasses
import os
import socket
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

import jax
import numpy as np

from bnjax import paired
from bnjax.training import Batch
from experiments.benchmark.epoch import epochs_of
from experiments.benchmark.turns import Part, take_turns, timing
from experiments.lab import arms, devices
from experiments.lab.presets import BOOSTCOURSE

BATCH = 512
STEPS = 20


class Layout(NamedTuple):
    """Where a measurement runs, each process with its share of the CPU's virtual devices."""

    processes: int
    devices: int
    statistics: str = "global"  # or "local", or "none": without batch normalization


LAYOUTS = (
    *(Layout(1, devices) for devices in (1, 2, 4, 8)),
    Layout(1, 8, "local"),
    Layout(1, 8, "none"),
    *(Layout(processes, processes) for processes in (2, 4)),
)


def run(repeats: int) -> Part:
    """Measures every layout."""
    found, rows = [], []
    for layout in LAYOUTS:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            measure = partial(_measure, layout, probe.getsockname()[1], repeats)
        with ProcessPoolExecutor(layout.processes, get_context("spawn")) as pool:
            seconds, *_ = pool.map(measure, range(layout.processes))
        found.append({**layout._asdict(), "seconds": seconds})
        rows.append({**layout._asdict(), **timing(seconds, "ms")})
    return found, f"A step of boostcourse on a batch of {BATCH}, spread over devices", rows


def _measure(layout: Layout, port: int, repeats: int, process: int) -> list[float]:
    """Seconds of a step each time."""
    os.environ["XLA_FLAGS"] = ""
    jax.config.update("jax_platforms", "cpu")
    mesh = f"replicate=1,data={layout.devices}"
    if layout.processes > 1:
        devices.join_processes(mesh, f"127.0.0.1:{port}", layout.processes, process)
    normalized = layout.statistics != "none"
    experiment = dataclasses.replace(BOOSTCOURSE, arms=("bn" if normalized else "no_bn",))
    placements = devices.make_placements(arms.make_arms(experiment), mesh, 1)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (STEPS * BATCH, 28, 28)).astype(np.uint8)
    data = Batch(images, rng.integers(0, 10, STEPS * BATCH).astype(np.int32))
    statistics = layout.statistics if normalized else "global"
    keys = paired.replicate_keys(0, 1)
    trainer = paired.Trainer(placements, keys, data, data, BATCH, statistics=statistics)
    (epochs,) = take_turns({"": epochs_of(trainer)}, repeats).values()
    return [seconds / STEPS for seconds in epochs]

"""How the time of a step grows with devices and processes, and what is communicated for it.

A child process, or several that JAX's distributed runtime joins, trains the network of boostcourse
with batch normalization on one mesh, and counts in its compiled program what devices send to each
other in a step. README says how to predict the time on a cluster from such counts.
"""

import dataclasses
import math
import os
import re
import socket
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from bnjax import paired
from bnjax.parallel.mesh import replicate_data
from bnjax.training import Batch
from experiments.benchmark.turns import Part, timing
from experiments.lab import arms, devices
from experiments.lab.presets import BOOSTCOURSE

BATCH = 512
STEPS = 20
COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) "  # the arrays that result
    r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
ARRAY = re.compile(r"(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")  # bits of an element, and the shape


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
            (seconds, sent), *_ = pool.map(measure, range(layout.processes))
        traffic = {"operations": len(sent), "bytes": sum(size for _, size in sent)}
        found.append({**layout._asdict(), "seconds": seconds, **traffic})
        cells = {heading: f"{value}" for heading, value in layout._asdict().items()}
        counts = {"all-reduces": f"{len(sent)}", "kB": f"{traffic['bytes'] / 1000:.1f}"}
        rows.append({**cells, **timing(seconds, "ms"), **counts})
    return found, f"A step of boostcourse on a batch of {BATCH}, spread over devices", rows


def collectives(program: str) -> list[tuple[str, int]]:
    """Kind and bytes of each communication in a compiled program, given its HLO as text.

    Example:
        >>> collectives("%a = (f32[16]{0}, f32[2,3]{1,0}) all-reduce(%x, %y), to_apply=%add")
        [('all-reduce', 88)]
    """
    found = []
    for arrays, kind in COLLECTIVE.findall(program):
        sizes = (
            int(bits or 8) // 8 * math.prod(int(n) for n in shape.split(",") if n)
            for bits, shape in ARRAY.findall(arrays)
        )
        found.append((kind, sum(sizes)))
    return found


def _measure(
    layout: Layout, port: int, repeats: int, process: int
) -> tuple[list[float], list[tuple[str, int]]]:
    """Seconds of a step each time, and its `collectives`."""
    os.environ["XLA_FLAGS"] = ""
    jax.config.update("jax_platforms", "cpu")
    mesh = f"replicate=1,data={layout.devices}"
    if layout.processes > 1:
        devices.join_processes(mesh, f"127.0.0.1:{port}", layout.processes, process)
    arm = "no_bn" if layout.statistics == "none" else "bn"
    experiment = dataclasses.replace(BOOSTCOURSE, arms=(arm,))
    (placement,) = devices.make_placements(arms.make_arms(experiment), mesh, 1)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (STEPS * BATCH, 28, 28)).astype(np.uint8)
    data = Batch(images, rng.integers(0, 10, STEPS * BATCH).astype(np.int32))
    keys = paired.replicate_keys(0, 1)
    states = paired.Trainer([placement], keys, data, data, BATCH).initial_states()
    data = replicate_data(data, placement.mesh)
    program = paired.train_epoch.lower(
        states,
        keys,
        1,
        data,
        batch_size=BATCH,
        drop_last=True,
        mesh=placement.mesh,
        statistics="local" if layout.statistics == "local" else "global",
    ).compile()
    seconds = []
    for epoch in range(repeats + 1):
        multihost_utils.sync_global_devices("the next epoch")
        start = time.perf_counter()
        states, _ = jax.block_until_ready(program(states, keys, epoch, data))
        seconds.append((time.perf_counter() - start) / STEPS)
    return seconds[1:], collectives(program.as_text() or "")

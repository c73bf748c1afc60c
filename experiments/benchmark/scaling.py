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
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import jax
import numpy as np

from bnjax import paired
from bnjax.paired import Trainer
from bnjax.parallel import processes
from bnjax.parallel.mesh import replicate_data
from bnjax.training import Batch
from experiments.benchmark.turns import Part, timing
from experiments.lab import arms, devices
from experiments.lab.presets import BOOSTCOURSE

BATCH = 512
STEPS = 20
COLLECTIVE = re.compile(
    r"= (?P<result>\(.*?\)|\S+) "
    r"(?P<kind>all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
ARRAY = re.compile(r"(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")  # bits of an element, and the shape


class Layout(NamedTuple):
    """Where a measurement runs.

    Attributes:
        processes: how many, each with `devices` / `processes` of the CPU's virtual devices.
        devices: how many in all, on the axis `data`.
        network: with "global" or "local" statistics, or "without" batch normalization.
    """

    processes: int
    devices: int
    network: str = "global"


LAYOUTS = (
    *(Layout(1, devices) for devices in (1, 2, 4, 8)),
    Layout(1, 8, "local"),
    Layout(1, 8, "without"),
    *(Layout(processes, processes) for processes in (2, 4)),
)


class Traffic(NamedTuple):
    """What a device takes part in during one step: number and bytes of the arrays reduced."""

    operations: int
    bytes: int


def traffic(program: str) -> Traffic:
    """What is communicated in a compiled program, which is to be one step in a loop.

    Args:
        program: HLO as text.

    Example:
        >>> traffic("%a = (f32[16]{0}, f32[2,3]{1,0}) all-reduce(%x, %y), to_apply=%add")
        Traffic(operations=1, bytes=88)
    """
    sizes = [
        int(bits or 8) // 8 * math.prod(int(n) for n in shape.split(",") if n)
        for match in COLLECTIVE.finditer(program)
        for bits, shape in ARRAY.findall(match["result"])
    ]
    return Traffic(sum(count_collectives(program).values()), sum(sizes))


def count_collectives(program: str) -> dict[str, int]:
    """How often each kind of communication stands in a compiled program.

    Example:
        >>> count_collectives("%a = f32[16]{0} all-reduce-start(%x)")
        {'all-reduce': 1}
    """
    return dict(Counter(match["kind"] for match in COLLECTIVE.finditer(program)))


def run(repeats: int) -> Part:
    """Measures every layout."""
    found = [{**layout._asdict(), **_start(layout, repeats)} for layout in LAYOUTS]
    rows = [
        {
            "processes": f"{one['processes']}",
            "devices": f"{one['devices']}",
            "statistics": one["network"],
            **timing(one["seconds"], "ms"),
            "all-reduces": f"{one['operations']}",
            "kB": f"{one['bytes'] / 1000:.1f}",
        }
        for one in found
    ]
    return found, f"A step of boostcourse on a batch of {BATCH}, spread over devices", rows


def _start(layout: Layout, repeats: int) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    measure = partial(_measure, layout, coordinator, repeats)
    with ProcessPoolExecutor(layout.processes, get_context("spawn")) as pool:
        first, *_ = pool.map(measure, range(layout.processes))
    return first


def _measure(layout: Layout, coordinator: str, repeats: int, process: int) -> dict[str, Any]:
    os.environ["XLA_FLAGS"] = ""
    jax.config.update("jax_platforms", "cpu")
    mesh = f"replicate=1,data={layout.devices}"
    if layout.processes > 1:
        devices.join_processes(mesh, coordinator, layout.processes, process)
    arm = "no_bn" if layout.network == "without" else "bn"
    experiment = dataclasses.replace(BOOSTCOURSE, arms=(arm,))
    (placement,) = devices.make_placements(arms.make_arms(experiment), mesh, 1)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (STEPS * BATCH, 28, 28)).astype(np.uint8)
    data = Batch(images, rng.integers(0, 10, STEPS * BATCH).astype(np.int32))
    keys = paired.replicate_keys(0, 1)
    states = Trainer([placement], keys, data, data, BATCH).initial_states()
    data = replicate_data(data, placement.mesh)
    program = paired.train_epoch.lower(
        states,
        keys,
        1,
        data,
        batch_size=BATCH,
        drop_last=True,
        mesh=placement.mesh,
        statistics="local" if layout.network == "local" else "global",
    ).compile()
    seconds = []
    for epoch in range(repeats + 1):
        processes.barrier("the next epoch")
        start = time.perf_counter()
        states, _ = jax.block_until_ready(program(states, keys, epoch, data))
        seconds.append((time.perf_counter() - start) / STEPS)
    return {"seconds": seconds[1:], **traffic(program.as_text() or "")._asdict()}

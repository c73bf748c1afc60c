"""How the time of a step grows with devices and processes, and what is communicated for it.

A child process, or several that JAX's distributed runtime joins, trains the network of boostcourse
with batch normalization on one mesh, and counts in its compiled program what devices send to each
other in a step. From such counts the time on a cluster can be predicted, see `predict`.
"""

import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from rich.table import Table

BATCH = 512
STEPS = 20
BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
COLLECTIVE = re.compile(
    r"= (?P<result>\(.*?\)|\S+) "
    r"(?P<kind>all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


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


class Machine(NamedTuple):
    """A cluster: seconds before a message arrives, and bytes per second between two devices."""

    latency: float
    bandwidth: float


def traffic(program: str) -> Traffic:
    """What is communicated in a compiled program, which is to be one step in a loop.

    Args:
        program: HLO as text.

    Example:
        >>> traffic("%a = (f32[16]{0}, f32[2,3]{1,0}) all-reduce(%x, %y), to_apply=%add")
        Traffic(operations=1, bytes=88)
    """
    sizes = [
        BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
        for match in COLLECTIVE.finditer(program)
        for dtype, shape in ARRAY.findall(match["result"])
    ]
    return Traffic(sum(count_collectives(program).values()), sum(sizes))


def count_collectives(program: str) -> dict[str, int]:
    """How often each kind of communication stands in a compiled program.

    Example:
        >>> count_collectives("%a = f32[16]{0} all-reduce-start(%x)")
        {'all-reduce': 1}
    """
    return dict(Counter(match["kind"] for match in COLLECTIVE.finditer(program)))


def predict(alone: float, sent: Traffic, devices: int, machine: Machine) -> float:
    """Seconds of a step whose batch is spread over so many devices.

        T(D) = T(1) / D + n 2 log2(D) latency + 2 (D - 1) / D bytes / bandwidth

    with n all-reduces of so many bytes together, each by recursive halving and doubling.

    Args:
        alone: seconds of the step on one device with the whole batch.
        sent: from `traffic`.
        devices: D.
        machine: of the cluster.

    Source: Thakur, Rabenseifner & Gropp, "Optimization of Collective Communication Operations in
    MPICH" (2005), section 4.5.

    Example:
        >>> round(predict(1.0, Traffic(2, 100), 2, Machine(0.1, 1000.0)), 3)
        1.0
    """
    if devices == 1:
        return alone
    waits = sent.operations * 2 * math.log2(devices) * machine.latency
    return alone / devices + waits + 2 * (devices - 1) / devices * sent.bytes / machine.bandwidth


def run(repeats: int) -> list[dict[str, Any]]:
    """Measures every layout: `{processes, devices, network, seconds, operations, bytes}`."""
    return [{**layout._asdict(), **_start(layout, repeats)} for layout in LAYOUTS]


def table(found: Sequence[dict[str, Any]]) -> Table:
    """One row per layout."""
    result = Table(title=f"A step of boostcourse on a batch of {BATCH}, spread over devices")
    for heading in ("processes", "devices", "statistics", "ms", "spread", "all-reduces", "kB"):
        result.add_column(heading, justify="right")
    for row in found:
        seconds = [1000 * s for s in row["seconds"]]
        result.add_row(
            f"{row['processes']}",
            f"{row['devices']}",
            row["network"],
            f"{median(seconds):.2f}",
            f"{max(seconds) - min(seconds):.2f}",
            f"{row['operations']}",
            f"{row['bytes'] / 1000:.1f}",
        )
    return result


def tell(found: Sequence[dict[str, Any]]) -> str:
    """One paragraph: the formula, and what it says of a cluster of 4,096 accelerators."""
    sent = {
        row["network"]: Traffic(row["operations"], row["bytes"])
        for row in found
        if row["devices"] == 8
    }
    devices, cluster = 4096, Machine(latency=10e-6, bandwidth=50e9)
    whole, own = (1000 * predict(0.0, sent[n], devices, cluster) for n in ("global", "local"))
    waits = 1000 * predict(0.0, sent["global"]._replace(bytes=0), devices, cluster)
    return (
        "On D devices a step takes T(1) / D + n 2 log2(D) latency + 2 (D - 1) / D bytes / "
        f"bandwidth. Here n = {sent['global'].operations} all-reduces (with statistics of the "
        "whole batch two forward and one backward for each layer with batch normalization, and one "
        f"for all gradients and the loss) carry {sent['global'].bytes / 1000:.1f} kB, whatever the "
        f"batch. Example: {devices:,} GPUs with {1e6 * cluster.latency:.0f} us of latency and "
        f"{cluster.bandwidth / 1e9:.0f} GB/s each (400 Gb/s) communicate for {whole:.2f} ms in a "
        f"step, of which {waits:.2f} ms are latency: to compute for nine tenths of the time, a "
        f"GPU's share of the batch should take {9 * whole:.0f} ms. With --bn-statistics local "
        f"n is {sent['local'].operations}, it is {own:.2f} ms, and {9 * own:.0f} ms are enough."
    )


def _start(layout: Layout, repeats: int) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    children = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps([*layout, coordinator, k, repeats])],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        )
        for k in range(layout.processes)
    ]
    told = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise RuntimeError(f"{layout} failed")
    return json.loads(told[0].splitlines()[-1])


def _measure(layout: Layout, coordinator: str, process: int, repeats: int) -> dict[str, Any]:
    import jax
    import numpy as np
    import optax

    from bnjax import distributed, hosts, models, paired
    from bnjax.paired import Arm, Lane
    from bnjax.training import Batch

    jax.config.update("jax_num_cpu_devices", layout.devices // layout.processes)
    if layout.processes > 1:
        hosts.start(coordinator, layout.processes, process)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (STEPS * BATCH, 28, 28)).astype(np.uint8)
    data = Batch(images, rng.integers(0, 10, STEPS * BATCH).astype(np.int32))
    mesh = distributed.make_mesh(1, layout.devices)
    module = models.MLP((32, 32), 512, layout.network != "without")
    keys = paired.replicate_keys(0, 1)
    lane = Lane((Arm("arm", module, optax.adam(1e-3)),), mesh)
    states = paired.create_states([lane], keys, images[:2])
    data = distributed.replicate_data(data, mesh)
    program = paired.train_epoch.lower(
        states,
        keys,
        1,
        data,
        batch_size=BATCH,
        drop_last=True,
        mesh=mesh,
        statistics="local" if layout.network == "local" else "global",
    ).compile()
    seconds = []
    for epoch in range(repeats + 1):
        hosts.wait("the next epoch")
        start = time.perf_counter()
        states, _ = jax.block_until_ready(program(states, keys, epoch, data))
        seconds.append((time.perf_counter() - start) / STEPS)
    return {"seconds": seconds[1:], **traffic(program.as_text() or "")._asdict()}


if __name__ == "__main__":
    *given, coordinator, process, repeats = json.loads(sys.argv[1])
    print(json.dumps(_measure(Layout(*given), coordinator, process, repeats)))

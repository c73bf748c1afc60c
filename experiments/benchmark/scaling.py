"""How the time of a step grows with devices and processes, and what is communicated for it.

A child process, or several that JAX's distributed runtime joins, trains the network of boostcourse
with batch normalization on one mesh, and counts in its compiled program what devices send to each
other in a step. README says how to predict the time on a cluster from such counts.
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

    from bnjax import models, paired
    from bnjax.paired import Arm, Placement, Trainer
    from bnjax.parallel import processes
    from bnjax.parallel.mesh import make_mesh, replicate_data
    from bnjax.training import Batch

    jax.config.update("jax_num_cpu_devices", layout.devices // layout.processes)
    if layout.processes > 1:
        processes.start(coordinator, layout.processes, process)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (STEPS * BATCH, 28, 28)).astype(np.uint8)
    data = Batch(images, rng.integers(0, 10, STEPS * BATCH).astype(np.int32))
    mesh = make_mesh(1, layout.devices)
    module = models.MLP((32, 32), 512, None if layout.network == "without" else "batch")
    keys = paired.replicate_keys(0, 1)
    placement = Placement((Arm("arm", module, optax.adam(1e-3)),), mesh)
    states = Trainer([placement], keys, data, data, BATCH).initial_states()
    data = replicate_data(data, mesh)
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
        processes.barrier("the next epoch")
        start = time.perf_counter()
        states, _ = jax.block_until_ready(program(states, keys, epoch, data))
        seconds.append((time.perf_counter() - start) / STEPS)
    return {"seconds": seconds[1:], **traffic(program.as_text() or "")._asdict()}


if __name__ == "__main__":
    *given, coordinator, process, repeats = json.loads(sys.argv[1])
    print(json.dumps(_measure(Layout(*given), coordinator, process, repeats)))

"""Which devices a run uses, decided before JAX starts."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import psutil

from bnjax.distributed import make_mesh, parse_mesh
from bnjax.paired import Arm, Lane

# JAX opens threads for each; some hundreds end the program.
MAX_CPUS = 64

CGROUP = Path("/sys/fs/cgroup/memory.max")


def cache_programs(directory: Path) -> None:
    """Keeps compiled programs in `directory`, for the next run to load."""
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def open_cpus(count: int | None = None) -> None:
    """Makes so many devices of the CPU, by default one of each core.

    `XLA_FLAGS` that say how many, and a JAX that runs already, are left as they are.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX runs already
            jax.config.update("jax_num_cpu_devices", count or _cores())


def describe() -> dict[str, Any]:
    """What there is to compute on, for the configuration of a run."""
    return {
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
    }


def make_lanes(arms: tuple[Arm, ...], mesh: str, replicates: int) -> list[Lane]:
    """Deals arms and replicates to devices.

    A CPU's cores become devices, unless `XLA_FLAGS` already says how many there are. Every arm is
    a program of its own there, so that its numbers do not depend on its neighbours, and with
    "auto" it has its own share of the cores. An accelerator trains all arms in one program.

    Args:
        arms: what to train.
        mesh: "auto", or sizes as `parse_mesh` reads them: then every arm uses that mesh.
        replicates: how many of each arm.

    Raises:
        ValueError: if the mesh does not fit the devices.
    """
    wanted = None if mesh == "auto" else parse_mesh(mesh)["replicate"]
    open_cpus(min(wanted or min(_cores(), len(arms) * replicates), MAX_CPUS))
    devices = _devices()
    if devices[0].platform != "cpu":
        return [Lane(arms, make_mesh(wanted or min(replicates, len(devices))))]
    if wanted or len(devices) < len(arms):
        shared = make_mesh(wanted or 1)
        return [Lane((arm,), shared) for arm in arms]
    share = len(devices) // len(arms)
    return [
        Lane((arm,), make_mesh(min(replicates, share), devices[k * share : (k + 1) * share]))
        for k, arm in enumerate(arms)
    ]


def _devices() -> list[jax.Device]:
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0] or "none of those asked for is there"
        raise ValueError(f"JAX finds no device ({reason}): see JAX_PLATFORMS, XLA_FLAGS") from error


def memory(lanes: Sequence[Lane]) -> int:
    """Bytes of memory on the accelerators of the lanes together, or of a machine without any.

    A container may have less than its machine: Linux tells by its control group.
    """
    stats = [d.memory_stats() for d in {d for lane in lanes for d in lane.mesh.devices.flat}]
    if all(stats):
        return sum(one["bytes_limit"] for one in stats)
    with contextlib.suppress(OSError, ValueError):
        return min(psutil.virtual_memory().total, int(CGROUP.read_text()))
    return psutil.virtual_memory().total


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

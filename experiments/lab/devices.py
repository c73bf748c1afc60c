"""Which devices a run uses, decided before JAX starts."""

import contextlib
import itertools
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import psutil

from bnjax.paired import Arm, Placement
from bnjax.parallel import processes
from bnjax.parallel.mesh import make_mesh, parse_mesh

# JAX opens threads for each; some hundreds end the program.
MAX_CPUS = 64

CGROUP = Path("/sys/fs/cgroup/memory.max")


def enable_compilation_cache(directory: Path) -> None:
    """Keeps compiled programs in `directory`, for the next run to load."""
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def set_cpu_devices(count: int | None = None) -> None:
    """Makes so many devices of the CPU, by default one of each core, and at most `MAX_CPUS`.

    `XLA_FLAGS` that say how many, and a JAX that runs already, are left as they are.
    """
    if _cores() == 1:  # XLA rounds otherwise where it has a single thread
        os.environ.setdefault("NPROC", "2")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX runs already
            jax.config.update("jax_num_cpu_devices", min(count or _cores(), MAX_CPUS))


def describe() -> dict[str, Any]:
    """What there is to compute on, for the configuration of a run."""
    return {
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
    }


def make_placements(arms: tuple[Arm, ...], mesh: str, replicates: int) -> list[Placement]:
    """Deals arms and replicates to devices, on a CPU to those that `set_cpu_devices` makes.

    There every arm is a program of its own, so that its numbers do not depend on its neighbours. An
    accelerator trains all in one. With several processes every program runs on all devices.

    Args:
        arms: what to train.
        mesh: "auto", or sizes as `parse_mesh` reads them: then every arm uses that mesh. "auto"
            has at most one device for each replicate, and never spreads a batch; programs have
            devices of their own as far as these go, and share them in turn.
        replicates: how many of each arm.

    Raises:
        ValueError: if the mesh does not fit the devices, or "auto" not those of several processes.
    """
    sizes = {} if mesh == "auto" else parse_mesh(mesh)
    together = jax.distributed.is_initialized()
    if not together:
        wanted = min(_cores(), len(arms) * replicates)
        set_cpu_devices(math.prod(sizes.values()) if sizes else wanted)
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0] or "none of those asked for is there"
        raise ValueError(f"JAX finds no device ({reason}): see JAX_PLATFORMS, XLA_FLAGS") from error
    programs = [(arm,) for arm in arms] if devices[0].platform == "cpu" else [arms]
    if together:
        _check_sizes_of_all(sizes, replicates)
        sizes = sizes or {"replicate": len(devices), "data": 1}
    if sizes:
        meshes = [make_mesh(sizes["replicate"], sizes["data"])]
    else:
        size = min(replicates, len(devices) // len(programs) or len(devices))
        starts = range(0, len(devices) - size + 1, size)
        meshes = [make_mesh(size, 1, devices[k : k + size]) for k in starts]
    return [Placement(*deal) for deal in zip(programs, itertools.cycle(meshes), strict=False)]


def _check_sizes_of_all(sizes: dict[str, int], replicates: int) -> None:
    """Refuses a mesh that leaves a device of several processes idle."""
    count = jax.device_count()
    have = f"{jax.process_count()} processes have {count}"
    if not sizes and count > replicates:
        most = max(n for n in range(1, replicates + 1) if count % n == 0)
        raise ValueError(
            f"{have} devices together, of which {replicates} replicate{'s' * (replicates > 1)} can "
            f"use {replicates}: choose --mesh replicate={most},data={count // most}, which spreads "
            f"the examples of each batch over them, or start a run with --replicates {count}"
        )
    if sizes and math.prod(sizes.values()) != count:
        told = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(
            f"mesh {told} has {math.prod(sizes.values())} devices: {have} together, and all of "
            "them take part"
        )


def join_processes(mesh: str, coordinator: str | None, count: int | None, own: int | None) -> None:
    """Joins the other processes, each with its share of the mesh where the devices are CPUs.

    The mesh is as `make_placements` takes it, the rest and the errors those of `processes.start`.
    """
    share = math.prod(parse_mesh(mesh).values()) // count if count and mesh != "auto" else 1
    set_cpu_devices(max(share, 1))
    # Standard output is left to Python: JAX's Gloo writes there whom it has met.
    sys.stdout.flush()
    python = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = os.fdopen(python, "w", buffering=1, encoding=sys.stdout.encoding, errors="replace")
    processes.start(coordinator, count, own)


def memory(placements: Sequence[Placement]) -> int:
    """Bytes of memory on the accelerators of the placements together, or of a machine without any.

    A container may have less than its machine: Linux tells by its control group.
    """
    used = {device for one in placements for device in one.mesh.devices.flat}
    own = jax.local_devices()[0].memory_stats()  # a process cannot ask for those of another
    if own:
        return len(used) * own["bytes_limit"]
    with contextlib.suppress(OSError, ValueError):
        return min(psutil.virtual_memory().total, int(CGROUP.read_text()))
    return psutil.virtual_memory().total


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

"""Several processes that compute together, on one machine or on many."""

import json
import re
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

# Seconds without a sign of life after which a process counts as lost. JAX's default is 100.
HEARTBEAT = 20

# Seconds to wait for all processes at the start: one that never comes is to be noticed in a minute.
PATIENCE = 50

# What JAX says where another process does not answer any more.
LOST = re.compile("Gloo|Connection|UNAVAILABLE|DEADLINE_EXCEEDED|[Hh]eartbeat|coordination service")

T = TypeVar("T")


def start(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins the other processes; to be called before anything touches a device.

    The coordinator is `host:port` of process 0, and `process` tells which of so many this is, from
    0. Without arguments JAX finds out from SLURM, Open MPI or Kubernetes. It ends a process that
    has waited for `PATIENCE` seconds for another.

    Raises:
        ValueError: if nothing says which processes there are, or the coordinator cannot be reached.
    """
    if coordinator is not None:
        _check_address(coordinator, process)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
    limits: Any = {"heartbeat_timeout_seconds": HEARTBEAT, "initialization_timeout": PATIENCE}
    try:
        jax.distributed.initialize(coordinator, processes, process, **limits)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the processes did not come together ({reason}): start all of them with the same "
            "--coordinator host:port and --num-processes, each with its own --process-id"
        ) from error


def _check_address(coordinator: str, process: int | None) -> None:
    """Refuses in words what JAX would end the process for without any."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"coordinator {coordinator!r}: expected HOST:PORT, as in 10.0.0.1:1234")
    if not process:
        try:
            return socket.create_server(("", int(port))).close()
        except OSError as error:
            told = f"process 0 cannot listen at port {port}: it is in use or not allowed"
            raise ValueError(f"{told}, choose another") from error
    limit = time.monotonic() + PATIENCE
    while True:
        try:
            return socket.create_connection((host, int(port)), timeout=PATIENCE).close()
        except OSError as error:
            if time.monotonic() > limit:
                told = f"process 0 does not answer at {coordinator} ({error.strerror or error})"
                todo = "start it within a minute, and give all processes its address"
                raise ValueError(f"{told}: {todo}") from error
        time.sleep(0.1)


def count() -> int:
    """How many processes there are; JAX starts for the answer only where there may be several."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process prints and writes."""
    return count() == 1 or jax.process_index() == 0


def name() -> str:
    """This process, in words."""
    return f"{socket.gethostname()} (process {jax.process_index()})"


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process does not answer any more."""
    return jax.distributed.is_initialized() and bool(LOST.search(str(error)))


def gather(tree: Any) -> Any:
    """The same pytree with all arrays whole, as NumPy, in every process."""
    return multihost_utils.process_allgather(tree, tiled=True)


def allgather_object(value: Any) -> list[Any]:
    """What each process holds, given something that JSON can hold."""
    if count() == 1:
        return [value]
    content = json.dumps(value).encode()
    length = int(multihost_utils.process_allgather(np.array(len(content))).max())
    padded = np.frombuffer(content.ljust(length), np.uint8)
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]


def run_on_all(work: Callable[[], T]) -> T:
    """The result of `work`, which every process calls; where it fails in one, it fails in all.

    Raises:
        ValueError: in the processes in which it did not fail, naming the host and what it says; an
            `OSError` where it was one.
    """
    if count() == 1:
        return work()
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    told = failure and [f"{name()}: {failure}", isinstance(failure, OSError)]
    problems = list(filter(None, allgather_object(told)))
    if failure:
        raise failure
    for problem, of_system in problems:
        raise (OSError if of_system else ValueError)(problem)
    return result


def check_same(values: Mapping[str, Any]) -> None:
    """Refuses, in all processes alike, to go on with one that would compute something else.

    Raises:
        ValueError: naming the host and what differs.
    """
    first, *others = allgather_object({"host": name(), **values})
    for other in others:
        different = [field for field in sorted(values) if other[field] != first[field]]
        if different:
            told = [f"{field} {other[field]!r} instead of {first[field]!r}" for field in different]
            raise ValueError(f"{other['host']} has {', '.join(told)}")

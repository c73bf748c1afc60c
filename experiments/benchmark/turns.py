"""Contenders take turns, each in a process of its own: they share nothing but the machine."""

import multiprocessing
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection

from experiments.benchmark.loops import Epoch, Job

Make = Callable[[Job], Epoch]
Seconds = list[tuple[float, float]]  # of training and of evaluation


def alternate(contenders: Mapping[str, tuple[Make, Job]], repeats: int) -> dict[str, Seconds]:
    """Seconds per epoch of each contender, `repeats` times in turns.

    Args:
        contenders: by name, what makes the epoch and its job; made in a new process each.
        repeats: how many measurements of each.

    Raises:
        RuntimeError: if a contender fails, which its own traceback explains.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    seconds: dict[str, Seconds] = {name: [] for name in contenders}
    try:
        for name, (make, job) in contenders.items():
            pipes[name], theirs = context.Pipe()
            processes.append(context.Process(target=_serve, args=(make, job, theirs), daemon=True))
            processes[-1].start()
            theirs.close()
            _receive(name, pipes[name])  # compiled and warm, before the next one starts
        for _ in range(repeats):
            for name, pipe in pipes.items():
                pipe.send(None)
                seconds[name].append(_receive(name, pipe))
    finally:
        for process in processes:
            process.terminate()
    return seconds


def _serve(make: Make, job: Job, pipe: Connection) -> None:
    call = make(job)
    pipe.send(call())
    while True:
        pipe.recv()
        pipe.send(call())


def _receive(name: str, pipe: Connection) -> tuple[float, float]:
    try:
        return pipe.recv()
    except EOFError as error:
        raise RuntimeError(f"{name} failed") from error

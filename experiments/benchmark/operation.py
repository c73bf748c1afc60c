"""Batch normalization in training mode, forward and backward, timed beside that of peers.

Everything is compiled before it is timed. Contenders take turns, so that a machine that slows down
slows all of them down.
"""

import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.table import Table

from bnjax.functional import BatchStats, batch_norm_train

SIZES = ((100, 32), (256, 512), (4096, 1024), (65536, 256))
LEAST_SECONDS = 0.05  # a measurement repeats short calls until it lasts this long

Call = Callable[[], Any]
Times = dict[tuple[int, ...], dict[str, list[float]]]
Forward = Callable[[Array, Array, Array], tuple[Array, Any]]


def run(repeats: int) -> Times:
    """Seconds of each contender at each size, `repeats` times."""
    sizes: Times = {}
    for shape in SIZES:
        x, gradient = (_normal(shape, seed) for seed in (0, 1))
        sizes[shape] = measure(contenders(x, gradient), repeats)
    return sizes


def measure(calls: Mapping[str, Call], repeats: int) -> dict[str, list[float]]:
    """Seconds per call, `repeats` times for each contender, in turns.

    Args:
        calls: by contender, a function that returns when its work is done.
        repeats: how many measurements of each.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    number = {name: math.ceil(LEAST_SECONDS / _time(call, 3)) for name, call in calls.items()}
    for _ in range(repeats):
        for name, call in calls.items():
            call()  # wakes its threads, and lets those of the others fall asleep
            seconds[name].append(_time(call, number[name]))
    return seconds


def contenders(x: np.ndarray, gradient: np.ndarray) -> dict[str, Call]:
    """Forward and backward pass by contender, PyTorch among them where it is installed.

    Args:
        x: `[N, C]` float32.
        gradient: `[N, C]` of the loss with respect to the result.
    """
    calls = {
        "bnjax": _in_jax(_bnjax, x, gradient),
        "Flax": _in_jax(_flax(use_fast_variance=True), x, gradient),
        "Flax, two-pass variance": _in_jax(_flax(use_fast_variance=False), x, gradient),
    }
    if importlib.util.find_spec("torch"):
        calls["PyTorch"] = _in_torch(x, gradient)
    return calls


def table(sizes: Times) -> Table:
    """Median and spread of each contender at each size, and its ratio to Flax."""
    shown = Table(title="Batch normalization, forward and backward")
    shown.add_column("float32 input")
    shown.add_column("")
    for heading in ("ms", "spread", "ratio to Flax"):
        shown.add_column(heading, justify="right")
    for shape, seconds in sizes.items():
        flax = statistics.median(seconds["Flax"])
        for name, values in seconds.items():
            median = statistics.median(values)
            first = name == next(iter(seconds))
            shown.add_row(
                " x ".join(map(str, shape)) if first else "",
                name,
                f"{1e3 * median:.3g}",
                f"{1e3 * spread(values):.2g}",
                f"{median / flax:.2f}",
            )
        shown.add_section()
    return shown


def spread(values: Sequence[float]) -> float:
    """The distance of the quartiles."""
    low, high = np.quantile(values, (0.25, 0.75))
    return float(high - low)


def _bnjax(x: Array, scale: Array, bias: Array) -> tuple[Array, Any]:
    stats = BatchStats(jnp.zeros(x.shape[-1]), jnp.ones(x.shape[-1]))
    return batch_norm_train(x, scale, bias, stats)


def _flax(use_fast_variance: bool) -> Forward:
    layer = nn.BatchNorm(use_running_average=False, use_fast_variance=use_fast_variance)

    def forward(x: Array, scale: Array, bias: Array) -> tuple[Array, Any]:
        stats = {"mean": jnp.zeros(x.shape[-1]), "var": jnp.ones(x.shape[-1])}
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
        return layer.apply(variables, x, mutable=["batch_stats"])

    return forward


def _in_jax(forward: Forward, x: np.ndarray, gradient: np.ndarray) -> Call:
    @jax.jit
    def both(x: Array, scale: Array, bias: Array, gradient: Array) -> Any:
        y, backward, stats = jax.vjp(forward, x, scale, bias, has_aux=True)
        return (y, *backward(gradient)), stats

    vectors = jnp.ones(x.shape[-1]), jnp.zeros(x.shape[-1])
    arrays = jnp.asarray(x), *vectors, jnp.asarray(gradient)
    return lambda: jax.block_until_ready(both(*arrays))[0]


def _in_torch(x: np.ndarray, gradient: np.ndarray) -> Call:
    import torch

    cuda = jax.devices()[0].platform == "gpu" and torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    layer = torch.nn.BatchNorm1d(x.shape[-1], device=device)
    inputs = torch.tensor(x, device=device, requires_grad=True)
    gradients = torch.tensor(gradient, device=device)

    def both() -> Any:
        y = layer(inputs)
        backward = torch.autograd.grad(y, (inputs, layer.weight, layer.bias), gradients)
        if cuda:
            torch.cuda.synchronize()
        return y.detach(), *backward

    return both


def _time(call: Call, number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number


def _normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)

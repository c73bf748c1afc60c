"""Batch normalization in training mode, forward and backward, timed beside that of peers."""

import importlib.util
import math
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bnjax.functional import BatchStats, batch_norm_train
from experiments.benchmark.turns import Part, interleave, timing

SIZES = ((100, 32), (256, 512), (4096, 1024), (65536, 256))
LEAST_SECONDS = 0.05  # a measurement repeats short calls until it lasts this long

Call = Callable[[], Any]
Forward = Callable[[Array, Array, Array], tuple[Array, Any]]


def run(repeats: int) -> Part:
    """Measures every size."""
    rng = np.random.default_rng(0)
    found, rows = [], []
    for shape in SIZES:
        x, gradient = rng.normal(size=(2, *shape)).astype(np.float32)
        calls = {name: stopwatch(call) for name, call in contenders(x, gradient).items()}
        seconds = interleave(calls, repeats)
        found.append({"shape": shape, "seconds": seconds})
        rows += [
            {
                "": name,
                "float32 input": " x ".join(map(str, shape)),
                **timing(values, "ms"),
                "/ Flax": f"{median(values) / median(seconds['Flax']):.2f}",
            }
            for name, values in seconds.items()
        ]
    return found, "Batch normalization, forward and backward", rows


def stopwatch(call: Call) -> Callable[[], float]:
    """What measures the seconds of a call, by so many that they last `LEAST_SECONDS`.

    Args:
        call: returns when its work is done.
    """

    def measure(number: int) -> float:
        call()  # compiles; wakes its threads, and lets those of the others fall asleep
        start = time.perf_counter()
        for _ in range(number):
            call()
        return (time.perf_counter() - start) / number

    return partial(measure, math.ceil(LEAST_SECONDS / measure(3)))


def contenders(x: np.ndarray, gradient: np.ndarray) -> dict[str, Call]:
    """Forward and backward pass by contender, PyTorch among them where it is installed.

    Args:
        x: `[N, C]` float32.
        gradient: `[N, C]` of the loss with respect to the result.
    """
    calls = {
        "bnjax": _in_jax(_bnjax, x, gradient),
        "Flax": _in_jax(partial(_flax, True), x, gradient),
        "Flax, two-pass variance": _in_jax(partial(_flax, False), x, gradient),
    }
    if importlib.util.find_spec("torch"):
        calls["PyTorch"] = _in_torch(x, gradient)
    return calls


def _bnjax(x: Array, scale: Array, bias: Array) -> tuple[Array, Any]:
    stats = BatchStats(jnp.zeros(x.shape[-1]), jnp.ones(x.shape[-1]))
    return batch_norm_train(x, scale, bias, stats)


def _flax(fast: bool, x: Array, scale: Array, bias: Array) -> tuple[Array, Any]:
    layer = nn.BatchNorm(use_running_average=False, use_fast_variance=fast)
    stats = {"mean": jnp.zeros(x.shape[-1]), "var": jnp.ones(x.shape[-1])}
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
    return layer.apply(variables, x, mutable=["batch_stats"])


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

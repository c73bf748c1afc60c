"""The layer in training mode, forward and backward, timed beside Flax's."""

import timeit
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax import Array

from bnjax import BatchNorm
from experiments.benchmark.turns import Part, compare, take_turns

SIZES = ((100, 32), (256, 512), (4096, 1024), (65536, 256))
LAYERS = {
    "bnjax": BatchNorm(use_running_average=False),
    "Flax": nn.BatchNorm(use_running_average=False),
    "Flax, two-pass variance": nn.BatchNorm(use_running_average=False, use_fast_variance=False),
}


def run(repeats: int) -> Part:
    """Measures every size."""
    rng = np.random.default_rng(0)
    found, rows = [], []
    for shape in SIZES:
        x, gradient = jax.device_put(rng.normal(size=(2, *shape)).astype(np.float32))
        calls = {name: stopwatch(both_passes(layer, x, gradient)) for name, layer in LAYERS.items()}
        seconds = take_turns(calls, repeats)
        found.append({"shape": shape, "seconds": seconds})
        size = " x ".join(map(str, shape))
        rows += [{"float32 input": size, **row} for row in compare(seconds, "ms")]
    return found, "Batch normalization, forward and backward", rows


def both_passes(layer: nn.Module, x: Array, gradient: Array) -> Callable[[], Any]:
    """What computes the result of a layer, its statistics, and the gradients by parameters and `x`.

    `x` and `gradient`, that by the result, are `[N, C]`.
    """

    @jax.jit
    def both(variables: Any, x: Array, gradient: Array) -> Any:
        def forward(params: Any, x: Array) -> tuple[Array, Any]:
            return layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])

        y, backward, stats = jax.vjp(forward, variables["params"], x, has_aux=True)
        return y, backward(gradient), stats

    variables = layer.init(jax.random.key(0), x)
    return lambda: jax.block_until_ready(both(variables, x, gradient))


def stopwatch(call: Callable[[], Any]) -> Callable[[], float]:
    """What measures the seconds of a call, by so many that they last a fifth of a second."""
    timer = timeit.Timer(call, setup=call)  # the first compiles, or wakes the threads it needs
    number, _ = timer.autorange()
    return lambda: timer.timeit(number) / number

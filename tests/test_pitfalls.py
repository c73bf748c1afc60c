"""Pitfalls of batch normalization: what other libraries do with each, then what bnjax does.

Each test asserts the other library's behaviour too, so it fails once that is repaired.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import batch_norm, relative_error

import bnjax
from bnjax import functional
from bnjax.functional import BatchStats, batch_norm_train

KEY = jax.random.key(0)


def normal(shape, offset=0.0, seed=0):
    return (np.random.default_rng(seed).normal(size=shape) + offset).astype(np.float32)


def fresh_stats(features):
    return BatchStats(jnp.zeros(features), jnp.ones(features))


def train(layer, x, variables=None, **arguments):
    """One step of training: the output and the new running statistics."""
    x = jnp.asarray(x)
    variables = variables or layer.init(KEY, x, **arguments)
    y, updates = layer.apply(variables, x, mutable=["batch_stats"], **arguments)
    return y, updates["batch_stats"]


def test_data_far_from_zero():
    """Flax's E[x^2] - E[x]^2 has no correct digit at 1e4, where a variance clipped at 0 multiplies
    by 1 / sqrt(epsilon) (flax#1491); its two-pass variance still suffers from a rounded mean."""
    x = normal((256, 8), offset=1e4)
    expected, *_ = batch_norm(x, 1, 0)
    fast, _ = train(nn.BatchNorm(use_running_average=False), x)
    slow, _ = train(nn.BatchNorm(use_running_average=False, use_fast_variance=False), x)
    assert relative_error(fast, expected) > 1
    assert relative_error(slow, expected) > 1e-4

    y, _ = train(bnjax.BatchNorm(use_running_average=False), x)
    assert relative_error(y, expected) < 1e-6


def test_shards_with_unequal_numbers_of_valid_rows():
    """Flax averages the means of the shards, as if all had equally many rows (flax#2417)."""
    x = np.stack([normal((4, 3), offset=5.0), normal((4, 3), seed=1)])
    mask = np.array([[1, 1, 1, 1], [1, 0, 0, 0]], bool)
    settings = {"use_running_average": False, "momentum": 0.0, "axis_name": "shard"}

    def run(layer):
        variables = layer.init(KEY, x[0])
        step = jax.vmap(lambda x, mask: train(layer, x, variables, mask=mask), axis_name="shard")
        return step(x, mask[..., None])

    _, stats = run(nn.BatchNorm(**settings))
    mean_of_means = (x[0].mean(axis=0) + x[1, 0]) / 2
    np.testing.assert_allclose(stats["mean"][0], mean_of_means, rtol=1e-5)

    y, stats = run(bnjax.BatchNorm(**settings))
    expected, mean, var = batch_norm(x, 1, 0, mask=mask)
    assert relative_error(mean_of_means, mean) > 0.3
    assert relative_error(y, expected) < 1e-6
    assert relative_error(stats["mean"], [mean, mean]) < 1e-6
    assert relative_error(stats["var"], [var, var]) < 1e-6


def test_debiased_running_variance():
    """Equinox's mode "batch" (equinox#948) divides by 1 - momentum^t as if the variance started at
    0, but it starts at 1: momentum^t / (1 - momentum^t) too much, 99 after one batch."""
    eqx = pytest.importorskip("equinox")
    x = normal((64, 4), offset=3.0)
    expected, mean, var = batch_norm(x, 1, 0)
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, "batch", mode="batch")
    forward = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    step = eqx.filter_jit(lambda x, state: forward(x, state)[1])
    infer = jax.vmap(eqx.nn.inference_mode(layer), "batch", (0, None), axis_name="batch")
    ema = average = fresh_stats(4)
    ours = jax.jit(batch_norm_train, static_argnames="momentum")
    for t in range(1, 101):
        state = step(x, state)
        _, ema = ours(x, None, None, ema, momentum=0.99)
        _, average = ours(x, None, None, average, momentum=None)
        if t in (1, 100):
            theirs, keep = infer(x, state)[0], 0.99**t
            excess = keep / (1 - keep)
            wrong = (x - mean) / np.sqrt(var + excess + 1e-5)
            np.testing.assert_allclose(theirs, wrong, rtol=1e-3, atol=1e-5)
            assert relative_error(theirs, expected) > (0.85 if t == 1 else 0.2)
            y = functional.batch_norm_eval(x, None, None, average)
            assert relative_error(y, expected) < 1e-6
            assert relative_error(ema.mean, (1 - keep) * mean) < 1e-5
            assert relative_error(ema.var, keep + (1 - keep) * var) < 1e-5

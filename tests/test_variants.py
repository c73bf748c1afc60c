from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import relative_error

import bnjax
from bnjax.functional import BatchStats, batch_norm_eval, batch_norm_train
from bnjax.variants import batch_renorm_train, virtual_batches

KEY = jax.random.key(0)
MASK = np.array([1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1, 0], bool)


def normal(shape, offset=0.0, seed=0, dtype=None):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) + offset, dtype)


def problem(shape=(12, 4)):
    """x, scale, bias, and running statistics that are far from those of x."""
    stats = BatchStats(jnp.array([0.9, 1.2, 3.0, -9.0]), jnp.array([1.1, 0.1, 9.0, 1.0]))
    return normal(shape, offset=1.0), normal(4, seed=1), normal(4, seed=2), stats


def in_turn(train, size):
    """What `virtual_batches(train, size)` should be."""

    def train_each(x, scale, bias, stats, mask=None):
        y = []
        for start in range(0, len(x), size):
            chunk = slice(start, start + size)
            part = None if mask is None else mask[chunk]
            result, stats = train(x[chunk], scale, bias, stats, mask=part)
            y.append(result)
        return jnp.concatenate(y), stats

    return train_each


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize(("shape", "mask"), [((12, 4), None), ((12, 4), MASK), ((12, 2, 4), None)])
@pytest.mark.parametrize("size", [4, 12])
def test_virtual_batches_are_batches_in_turn(size, shape, mask, momentum):
    *arguments, stats = problem(shape)
    if momentum is None:
        stats = stats._replace(count=jnp.array(3, jnp.int32))
    train = partial(batch_norm_train, momentum=momentum)

    def run(each, *arguments):
        y, updated = each(*arguments, stats, mask=mask)
        loss = jnp.sum(jnp.sin(y)) + jnp.sum(updated.mean * jnp.log(updated.var))
        return loss, (y, updated)

    results = [
        jax.jit(jax.grad(partial(run, each), argnums=(0, 1, 2), has_aux=True))(*arguments)
        for each in (virtual_batches(train, size), in_turn(train, size))
    ]
    chex.assert_trees_all_close(*results, rtol=1e-12, atol=1e-13)
    updated = results[0][1][1]
    assert updated.count is None if momentum else int(updated.count) == 3 + 12 // size


@pytest.mark.parametrize("size", [5, 24, 0, -4])
def test_virtual_batches_must_fill_the_batch(size):
    with pytest.raises(ValueError, match=f"virtual_batch_size is {size}: .* batch of 12 examples"):
        virtual_batches(batch_norm_train, size)(*problem())
    layer = bnjax.BatchNorm(use_running_average=False, virtual_batch_size=size)
    variables = nn.BatchNorm(use_running_average=False).init(KEY, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=f"virtual_batch_size is {size}"):
        layer.apply(variables, jnp.ones((12, 4)), mutable=["batch_stats"])


def corrections(x, stats, limits, epsilon=1e-5):
    """r and d before and after they are clipped, in NumPy."""
    x, mean, var = (np.asarray(a) for a in (x, stats.mean, stats.var))
    r_max, d_max = limits
    running_std = np.sqrt(var + epsilon)
    r = np.sqrt(x.var(axis=0) + epsilon) / running_std
    d = (x.mean(axis=0) - mean) / running_std
    return (r, d), (np.clip(r, 1 / r_max, r_max), np.clip(d, -d_max, d_max))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("limits", "clipped"), [((1.0, 0.0), 8), ((1.5, 0.5), 4), ((3.0, 5.0), 2), ((1e3, 1e3), 0)]
)
def test_renorm_is_algorithm_1_with_constant_corrections(limits, clipped):
    *arguments, stats = problem()
    weights = normal((12, 4), seed=3)
    free, (r, d) = corrections(arguments[0], stats, limits)
    assert np.sum(np.stack(free) != np.stack([r, d])) == clipped

    def renorm(x, scale, bias):
        y, updated = batch_renorm_train(x, scale, bias, stats, limits=limits)
        return jnp.sum(jnp.sin(y) * weights), (y, updated)

    def with_constants(x, scale, bias):
        y, updated = batch_norm_train(x, scale * r, scale * d + bias, stats)
        return jnp.sum(jnp.sin(y) * weights), (y, updated)

    gradients, (y, updated) = jax.grad(renorm, argnums=(0, 1, 2), has_aux=True)(*arguments)
    expected = jax.grad(with_constants, argnums=(0, 1, 2), has_aux=True)(*arguments)
    chex.assert_trees_all_close((gradients, (y, updated)), expected, rtol=1e-12, atol=1e-13)

    x, scale, bias = map(np.asarray, arguments)
    x_hat = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)
    assert relative_error(y, scale * (x_hat * r + d) + bias) < 1e-14
    assert relative_error(updated.var, 0.9 * stats.var + 0.1 * x.var(axis=0)) < 1e-14


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("affine", [True, False])
def test_limits_lie_between_the_batch_and_the_running_statistics(mask, affine):
    x, *affines, stats = problem()
    arguments = [x, *(affines if affine else (None, None)), stats]
    tight = batch_renorm_train(*arguments, limits=(1.0, 0.0), mask=mask, momentum=0.8, ddof=1)
    alone = batch_norm_train(*arguments, mask=mask, momentum=0.8, ddof=1)
    chex.assert_trees_all_close(tight, alone, rtol=1e-12, atol=1e-13)
    wide, _ = batch_renorm_train(*arguments, limits=(np.inf, np.inf), mask=mask)
    rows = slice(None) if mask is None else mask
    assert relative_error(wide[rows], batch_norm_eval(*arguments)[rows]) < 1e-13


def test_scheduled_limits_compile_once():
    def train(limits):
        return batch_renorm_train(*problem(), limits=limits)[0]

    compiled = jax.jit(chex.assert_max_traces(train, n=1))
    for limits in ((1.0, 0.0), (1.5, 0.5), (3.0, 5.0)):
        assert relative_error(compiled(limits), train(limits)) < 1e-6


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ((0.5, 1.0), "r_max is 0.5: expected at least 1"),
        ((np.nan, 1.0), "r_max is nan"),
        ((3.0, -1.0), "d_max is -1.0: expected at least 0"),
        ((3.0, np.nan), "d_max is nan"),
    ],
)
def test_limits_out_of_range_are_refused(limits, message):
    with pytest.raises(ValueError, match=message):
        batch_renorm_train(*problem(), limits=limits)


RENORM = partial(batch_renorm_train, limits=(3.0, 5.0), momentum=0.7)
SETTINGS = [
    ({"virtual_batch_size": 4}, virtual_batches(partial(batch_norm_train, momentum=0.7), 4)),
    ({"renorm": (3.0, 5.0)}, RENORM),
    ({"virtual_batch_size": 4, "renorm": (3.0, 5.0)}, virtual_batches(RENORM, 4)),
]


@pytest.mark.parametrize(("settings", "train"), SETTINGS)
@pytest.mark.parametrize("mask", [None, MASK])
def test_the_layer_trains_as_the_function_and_evaluates_as_flax(settings, train, mask):
    layer, flax = bnjax.BatchNorm(momentum=0.7, **settings), nn.BatchNorm()
    x = normal((12, 4), offset=1.0, dtype=jnp.float32)
    variables = flax.init(KEY, x, use_running_average=True)
    params = {"scale": jnp.arange(4.0, dtype=jnp.float32), "bias": jnp.ones(4, jnp.float32)}
    variables = {**variables, "params": params}

    @jax.jit
    def step(variables):
        return layer.apply(
            variables, x, use_running_average=False, mask=mask, mutable=["batch_stats"]
        )

    stats = BatchStats(**variables["batch_stats"])
    for _ in range(2):
        y, updates = step(variables)
        expected, stats = train(x, params["scale"], params["bias"], stats, mask=mask)
        assert relative_error(y, expected) < 1e-6
        variables = {**variables, **updates}
        chex.assert_trees_all_close(BatchStats(**updates["batch_stats"]), stats, rtol=1e-6)

    for rows in (x[:1], x[:7]):
        y = layer.apply(variables, rows, use_running_average=True)
        expected = flax.apply(variables, rows, use_running_average=True)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [settings for settings, _ in SETTINGS])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 7])
def test_init_takes_any_batch_size(settings, batch_size):
    x = jnp.ones((batch_size, 3), jnp.float32)
    ours, flax = (
        layer.init(KEY, x, use_running_average=False)
        for layer in (bnjax.BatchNorm(**settings), nn.BatchNorm())
    )
    chex.assert_trees_all_equal(ours, flax)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((0, 4))}, "N = 0"),
        ({"mask": jnp.ones(5, bool)}, r"mask has shape \(5,\)"),
        ({"scale": jnp.ones(1)}, r"scale has shape \(1,\)"),
        ({"bias": jnp.ones(2)}, r"bias has shape \(2,\)"),
    ],
)
def test_relatives_refuse_what_batch_norm_refuses(change, message):
    x, scale, bias, stats = problem()
    arguments = {"x": x, "scale": scale, "bias": bias, "stats": stats, "mask": None} | change
    renorm = partial(batch_renorm_train, limits=(3.0, 5.0))
    for train in (batch_norm_train, renorm, virtual_batches(batch_norm_train, 4)):
        with pytest.raises(ValueError, match=message):
            train(**arguments)


@pytest.mark.parametrize("given", [None, 3])
def test_a_count_is_kept_up_and_starts_at_zero_for_an_average(given):
    x, scale, bias, stats = problem()
    stats = stats._replace(count=None if given is None else jnp.array(given))
    averaging = virtual_batches(partial(batch_norm_train, momentum=None), 4)
    assert averaging(x, scale, bias, stats)[1].count == (given or 0) + 3
    count = virtual_batches(batch_norm_train, 4)(x, scale, bias, stats)[1].count
    assert count == (None if given is None else 6)


def test_limits_may_be_arrays_under_jit():
    x, scale, bias, stats = problem()
    limits = (jnp.float32(1.5), jnp.float32(0.5))
    train = partial(batch_renorm_train, x, scale, bias, stats)
    y, _ = jax.jit(lambda: train(limits=limits))()
    assert relative_error(y, train(limits=(1.5, 0.5))[0]) < 1e-6

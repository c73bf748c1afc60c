from functools import partial, reduce

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from reference import relative_error

from bnjax.moments import Moments, centre, merge

pytestmark = pytest.mark.usefixtures("all_optimizations")


def normal(shape, offset=0.0, seed=0, dtype=np.float64):
    return (np.random.default_rng(seed).normal(size=shape) + offset).astype(dtype)


def moments(x):
    return centre(jnp.asarray(x), None, None)[1]


def naive(x, valid):
    """Deviations of the valid rows, mean and variance, without a custom derivative."""
    weights = jnp.ones((len(x), 1), x.dtype) if valid is None else valid.astype(x.dtype)
    mean = (weights * x).sum(axis=0) / weights.sum()
    deviation = weights * (x - mean[None])
    return deviation, mean, jnp.square(deviation).sum(axis=0) / weights.sum()


def ours(x, valid, axis_name=None):
    centred, (mean, var, _) = centre(x, valid, axis_name)
    return centred if valid is None else jnp.where(valid, centred, 0), mean, var


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("offset", "tolerance"), [(0.0, 1e-12), (1e5, 1e-11)])
def test_merged_splits_have_the_moments_of_the_whole(seed, offset, tolerance):
    x = normal((150, 3), offset, seed)
    cuts = np.sort(np.random.default_rng(seed).integers(0, 151, 4))
    parts = [moments(part) for part in np.split(x, [0, *cuts, 150])]
    assert parts[0].count == parts[-1].count == 0
    merged = reduce(merge, parts)
    assert merged.count == 150
    assert relative_error(merged.mean, x.mean(axis=0)) < 1e-14
    assert relative_error(merged.var, x.var(axis=0)) < tolerance


@pytest.mark.parametrize("seed", range(4))
def test_merging_adds_no_error_at_a_large_offset(seed):
    split = 40 * seed
    x = normal((150, 3), 1e5, seed, np.float32)
    merged = merge(moments(x[:split]), moments(x[split:]))
    assert relative_error(merged.mean, x.astype(np.float64).mean(axis=0)) < 1e-6
    (mean_a, var_a, n_a), (mean_b, var_b, n_b) = (
        jax.tree.map(lambda a: np.asarray(a, np.float64), moments(part))
        for part in (x[:split], x[split:])
    )
    mean = (n_a * mean_a + n_b * mean_b) / 150
    var = (n_a * (var_a + (mean_a - mean) ** 2) + n_b * (var_b + (mean_b - mean) ** 2)) / 150
    assert relative_error(merged.var, var) < 1e-6


def test_empty_sets_merge_to_an_empty_set():
    empty = Moments(jnp.zeros(2), jnp.zeros(2), jnp.array(0.0))
    chex.assert_trees_all_equal(merge(empty, empty), empty)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mask", [None, [1, 0, 1, 1, 0, 1, 1]])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_the_derivative_is_that_of_plain_moments(mask, offset):
    x, dx = jnp.asarray(normal((7, 3), offset)), jnp.asarray(normal((7, 3), seed=1))
    valid = None if mask is None else jnp.array(mask, bool)[:, None]
    results = []
    for moments_of in (ours, naive):
        out, tangents = jax.jvp(lambda x, f=moments_of: f(x, valid), (x,), (dx,))
        _, vjp = jax.vjp(lambda x, f=moments_of: f(x, valid), x)
        cotangents = tuple(jnp.asarray(normal(a.shape, seed=a.ndim)) for a in out)
        results.append((out, tangents, vjp(cotangents)))
    chex.assert_trees_all_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_devices_differentiate_as_one(masked, check_vma):
    count = len(jax.devices())
    mesh = jax.make_mesh((count,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x, dx, weights = (jnp.asarray(normal((4 * count, 3), seed=k)) for k in range(3))
    valid = jnp.asarray([k % 4 <= k // 4 for k in range(4 * count)])[:, None].at[:2].set(True)
    valid = valid if masked else None

    def loss(x, valid, weights, axis_name=None):
        centred, mean, var = ours(x, valid, axis_name)
        own = jnp.sum(weights * jnp.sin(centred))
        total = own if axis_name is None else jax.lax.psum(own, axis_name)
        return total + jnp.sum(jnp.sin(mean) * jnp.log(var))

    rows = PartitionSpec("d")
    sharded = jax.shard_map(
        partial(loss, axis_name="d"),
        mesh=mesh,
        in_specs=(rows, rows if masked else None, rows),
        out_specs=PartitionSpec(),
        check_vma=check_vma,
    )
    expected, gradient = jax.value_and_grad(loss)(x, valid, weights)
    run = jax.jit(lambda x: sharded(x, valid, weights))
    value, slope = jax.jvp(run, (x,), (dx,))
    assert relative_error(value, expected) < 1e-13
    assert relative_error(slope, jnp.vdot(gradient, dx)) < 1e-13
    assert relative_error(jax.grad(run)(x), gradient) < 1e-13


@pytest.mark.parametrize("rows", [1000, 4096, 4160, 65536])
def test_devices_that_share_a_batch_exchange_sums_alone(rows):
    if jax.device_count() < 8:
        pytest.skip("eight devices are needed")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(jnp.ones((rows, 4)), NamedSharding(mesh, PartitionSpec("data")))
    program = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(centre(x, None, None)[0]))))
    text = program.lower(x).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    assert "collective-permute" not in text


@pytest.mark.parametrize("rows", [128, 257, 509, 4097, 8191])
def test_sums_of_any_length_are_accurate(rows):
    x = normal((rows, 8), dtype=np.float32) + 1
    _, moments = centre(jnp.asarray(x), None, None)
    assert relative_error(moments.mean, x.mean(axis=0, dtype=np.float64)) < 1e-6
    assert relative_error(moments.var, x.astype(np.float64).var(axis=0)) < 1e-6

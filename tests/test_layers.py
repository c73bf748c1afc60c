from functools import partial

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from reference import batch_norm, relative_error

import bnjax

KEY = jax.random.key(0)


def normal(shape, offset=0.0, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) + offset, jnp.float32)


def train(layer, variables, x, **arguments):
    """One step of training: the output and the variables after it."""
    y, updates = layer.apply(
        variables, x, use_running_average=False, mutable=["batch_stats"], **arguments
    )
    return y, {**variables, **updates}


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("axis", [-1, 1, (1, 2), (-1, 1), (0, 2)])
@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
def test_drop_in_for_flax(axis, use_scale, use_bias):
    settings = {"axis": axis, "use_scale": use_scale, "use_bias": use_bias, "momentum": 0.9}
    ours, theirs = bnjax.BatchNorm(**settings), nn.BatchNorm(**settings)
    x = normal((16, 4, 5), offset=1.0)
    variables = theirs.init(KEY, x, use_running_average=False)
    chex.assert_trees_all_equal(ours.init(KEY, x, use_running_average=False), variables)
    for _ in range(3):
        y, after = train(ours, variables, x)
        expected, variables = train(theirs, variables, x)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
        chex.assert_trees_all_close(after, variables, rtol=1e-5)
    y = ours.apply(variables, x, use_running_average=True)
    expected = theirs.apply(variables, x, use_running_average=True)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_accurate_where_flax_is_not():
    x = normal((256, 8), offset=1e4)
    expected, *_ = batch_norm(x, 1, 0)
    errors = {}
    for layer in (bnjax.BatchNorm, nn.BatchNorm):
        y, _ = layer(use_running_average=False).init_with_output(KEY, x)
        errors[layer] = relative_error(y, expected)
    assert errors[bnjax.BatchNorm] < 1e-6
    assert errors[nn.BatchNorm] > 1


def test_ddof_one_tracks_the_unbiased_variance():
    x = normal((5, 2))
    layer = bnjax.BatchNorm(use_running_average=False, momentum=0.0, ddof=1)
    _, updates = layer.apply(layer.init(KEY, x), x, mutable=["batch_stats"])
    np.testing.assert_allclose(updates["batch_stats"]["var"], np.var(x, axis=0, ddof=1), rtol=1e-6)


@pytest.mark.parametrize("trailing", [False, True])
def test_mask_with_or_without_a_trailing_axis(trailing):
    x = normal((6, 3)).at[4:].set(jnp.nan)
    mask = jnp.arange(6) < 4
    layer = bnjax.BatchNorm(use_running_average=False)
    y = layer.init_with_output(KEY, x, mask=mask[:, None] if trailing else mask)[0]
    expected, *_ = batch_norm(np.nan_to_num(x), 1, 0, mask=np.asarray(mask))
    assert relative_error(y, expected) < 1e-6


def test_bfloat16_input_keeps_float32_variables():
    x = normal((8, 3)).astype(jnp.bfloat16)
    layer = bnjax.BatchNorm(use_running_average=False)
    y, variables = layer.init_with_output(KEY, x)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_a_batch_of_one_is_an_error_in_training_alone():
    layer = bnjax.BatchNorm()
    variables = layer.init(KEY, jnp.ones((1, 3)), use_running_average=False)
    with pytest.raises(ValueError, match=r"N = 1 in x of shape \(1, 3\)"):
        layer.apply(variables, jnp.ones((1, 3)), use_running_average=False, mutable=["batch_stats"])
    assert layer.apply(variables, jnp.ones((1, 3)), use_running_average=True).shape == (1, 3)


def test_training_or_evaluation_must_be_said_once():
    with pytest.raises(ValueError, match="use_running"):
        bnjax.BatchNorm().init(KEY, jnp.ones((2, 3)))


def test_a_wider_result_is_not_rounded_to_the_input_first():
    x = normal((64, 3)).astype(jnp.bfloat16)
    layer = bnjax.BatchNorm(use_running_average=False, dtype=jnp.float32)
    y, _ = layer.init_with_output(KEY, x)
    expected, *_ = batch_norm(x.astype(jnp.float32), 1, 0)
    assert y.dtype == jnp.float32
    assert relative_error(y, expected) < 1e-6


def test_mask_of_several_feature_axes():
    x, mask = normal((6, 2, 5, 3), offset=1.0), jnp.arange(30).reshape(6, 5) % 3 > 0
    layer = bnjax.BatchNorm(use_running_average=False, axis=(1, 3))
    y, _ = layer.init_with_output(KEY, x, mask=mask)
    rows = jnp.moveaxis(x, 1, 2).reshape(6, 5, 6)
    expected, *_ = batch_norm(rows, 1, 0, mask=np.asarray(mask))
    assert relative_error(jnp.moveaxis(y, 1, 2).reshape(6, 5, 6), expected) < 1e-6
    same, _ = layer.init_with_output(KEY, x, mask=mask[:, None, :, None])
    np.testing.assert_array_equal(same, y)


@pytest.mark.parametrize("axis", [-1, (1, 2)])
def test_checkpoints_of_flax_load(axis):
    ours, theirs = bnjax.BatchNorm(axis=axis), nn.BatchNorm(axis=axis)
    x = normal((8, 2, 3), offset=2.0)
    _, trained = train(theirs, theirs.init(KEY, x, use_running_average=False), x)
    fresh = ours.init(jax.random.key(1), x, use_running_average=False)
    loaded = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(trained))
    y = ours.apply(loaded, x, use_running_average=True)
    assert relative_error(y, theirs.apply(trained, x, use_running_average=True)) < 1e-6


def test_momentum_none_averages_and_counts():
    layer = bnjax.BatchNorm(momentum=None)
    batches = [normal((10, 2), offset=k, seed=k) for k in range(4)]
    variables = layer.init(KEY, batches[0], use_running_average=False)
    assert variables["batch_stats"]["count"] == 0
    for x in batches:
        _, variables = train(layer, variables, x)
    stats = variables["batch_stats"]
    assert stats["count"] == 4
    assert relative_error(stats["mean"], np.mean([x.mean(axis=0) for x in batches], axis=0)) < 1e-6
    assert relative_error(stats["var"], np.mean([x.var(axis=0) for x in batches], axis=0)) < 1e-6
    assert layer.apply(variables, x, use_running_average=True).shape == x.shape

    _, counted = train(bnjax.BatchNorm(momentum=0.9), variables, x)
    assert counted["batch_stats"]["count"] == 5
    del variables["batch_stats"]["count"]
    _, uncounted = train(bnjax.BatchNorm(momentum=0.9), variables, x)
    assert set(uncounted["batch_stats"]) == {"mean", "var"}
    del counted["batch_stats"]["count"]
    chex.assert_trees_all_equal(counted, uncounted)


class Network(nn.Module):
    """Two layers with normalization, each in `wrap`."""

    wrap: type[nn.Module] = bnjax.BatchNorm

    @nn.compact
    def __call__(self, x, use_running_average):
        for k in range(2):
            x = nn.Dense(4, name=f"dense_{k}")(x)
            x = nn.tanh(self.wrap(use_running_average, name=f"norm_{k}")(x))
        return x


@pytest.mark.usefixtures("x64")
def test_rematerialization_updates_once():
    x = normal((8, 3), offset=1.0).astype(jnp.float64)
    variables = Network().init(KEY, x, use_running_average=False)
    variables = jax.tree.map(lambda a: a.astype(jnp.float64), variables)

    def loss(network, params):
        y, after = train(network, {**variables, "params": params}, x)
        return jnp.sum(y**3), after["batch_stats"]

    results = [
        jax.jit(jax.grad(partial(loss, network), has_aux=True))(variables["params"])
        for network in (Network(), Network(nn.remat(bnjax.BatchNorm)))
    ]
    chex.assert_trees_all_close(*results, rtol=1e-12, atol=1e-13)


class InTurn(nn.Module):
    """One layer that sees one batch after the other."""

    @nn.compact
    def __call__(self, batches):
        def step(layer, carry, x):
            return carry, layer(x, use_running_average=False)

        over = {"variable_broadcast": "params", "variable_carry": "batch_stats"}
        layer = bnjax.BatchNorm(momentum=0.9, name="layer")
        return nn.scan(step, **over, split_rngs={"params": False})(layer, None, batches)[1]


def test_scan_over_steps_equals_the_loop():
    layer, batches = bnjax.BatchNorm(momentum=0.9), normal((5, 6, 3), offset=2.0)
    first = layer.init(KEY, batches[0], use_running_average=False)

    def step(variables, x):
        y, variables = train(layer, variables, x)
        return variables, y

    variables, expected = first, []
    for x in batches:
        variables, y = step(variables, x)
        expected.append(y)
    expected = jnp.stack(expected)

    after, y = jax.lax.scan(step, first, batches)
    chex.assert_trees_all_close((after, y), (variables, expected), rtol=1e-5, atol=1e-6)
    nested = {kind: {"layer": leaves} for kind, leaves in first.items()}
    y, updates = InTurn().apply(nested, batches, mutable=["batch_stats"])
    stats = {"layer": variables["batch_stats"]}
    chex.assert_trees_all_close(
        (updates["batch_stats"], y), (stats, expected), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("spread", ["vmap", "shard_map"])
def test_devices_with_unequal_masks_share_exact_statistics(spread):
    count = 4 if spread == "vmap" else len(jax.devices())
    x = normal((count, 4, 3), offset=100.0)
    mask = np.array([[True, True, k > 1, k % 2 == 0] for k in range(count)])
    layer = bnjax.BatchNorm(momentum=0.0, axis_name="d")
    variables = layer.init(KEY, x[0], use_running_average=False)

    def step(x, mask):
        y, after = train(layer, variables, x, mask=mask)
        return y, after["batch_stats"]

    if spread == "vmap":
        y, stats = jax.vmap(step, axis_name="d")(x, mask)
        stats = jax.tree.map(lambda a: a[-1], stats)
    else:
        mesh = jax.make_mesh((count,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        split, whole = PartitionSpec("d"), PartitionSpec()
        step = jax.shard_map(step, mesh=mesh, in_specs=(split, split), out_specs=(split, whole))
        y, stats = jax.jit(step)(x.reshape(-1, 3), mask.ravel())
    expected, mean, var = batch_norm(x, 1, 0, mask=mask)
    assert relative_error(y.reshape(x.shape), expected) < 1e-6
    assert relative_error(stats["mean"], mean) < 1e-6
    assert relative_error(stats["var"], var) < 1e-6


def test_averages_go_on_from_flax_variables_which_have_no_count():
    x = normal((8, 3), offset=1.0)
    variables = nn.BatchNorm(use_running_average=False).init(KEY, x)
    layer = bnjax.BatchNorm(momentum=None)
    assert layer.apply(variables, x, use_running_average=True).shape == x.shape
    _, updates = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    assert updates["batch_stats"]["count"] == 1
    np.testing.assert_allclose(updates["batch_stats"]["mean"], x.mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize("momentum", [0.9, None])
def test_virtual_batches_are_counted_one_by_one(momentum):
    x = normal((8, 3))
    layer = bnjax.BatchNorm(False, momentum=momentum, virtual_batch_size=4)
    variables = layer.init(KEY, x)
    variables["batch_stats"]["count"] = jnp.array(5, jnp.int32)
    _, updates = layer.apply(variables, x, mutable=["batch_stats"])
    assert updates["batch_stats"]["count"] == 7


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
def test_bfloat16_under_strict_promotion(dtype):
    layer = bnjax.BatchNorm(use_running_average=False, dtype=dtype)
    y, variables = layer.init_with_output(KEY, normal((8, 3)).astype(jnp.bfloat16))
    assert y.dtype == (dtype or jnp.bfloat16)
    assert variables["batch_stats"]["mean"].dtype == jnp.float32


def test_one_sample_at_a_time_under_vmap():
    x = normal((8, 3), offset=2.0)
    layer = bnjax.BatchNorm(axis_name="batch")
    variables = layer.init(KEY, x, use_running_average=True)

    def train(row):
        return layer.apply(variables, row, use_running_average=False, mutable=["batch_stats"])

    y, updates = jax.vmap(train, axis_name="batch")(x)
    expected, changed = train_all(layer, variables, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    mean = updates["batch_stats"]["mean"][0]
    np.testing.assert_allclose(mean, changed["batch_stats"]["mean"], rtol=1e-6)
    evaluate = jax.vmap(lambda row: layer.apply(variables, row, use_running_average=True))
    np.testing.assert_allclose(evaluate(x), layer.apply(variables, x, use_running_average=True))
    with pytest.raises(ValueError, match="N = 1"):
        layer.clone(axis_name=None).apply(variables, x[0], use_running_average=False)


def train_all(layer, variables, x):
    alone = layer.clone(axis_name=None)
    return alone.apply(variables, x, use_running_average=False, mutable=["batch_stats"])


def test_numpy_input_of_float64_is_taken_as_jax_takes_it():
    x = np.random.default_rng(0).normal(size=(8, 3))
    y, _ = bnjax.BatchNorm(use_running_average=False).init_with_output(KEY, x)
    assert y.dtype == jnp.asarray(x).dtype

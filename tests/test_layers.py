import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import batch_norm, relative_error

import bnjax

KEY = jax.random.key(0)


def normal(shape, offset=0.0, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) + offset, jnp.float32)


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
def test_drop_in_for_flax(axis, use_scale, use_bias):
    settings = {"axis": axis, "use_scale": use_scale, "use_bias": use_bias, "momentum": 0.9}
    ours, flax = bnjax.BatchNorm(**settings), nn.BatchNorm(**settings)
    x = normal((16, 4, 5), offset=1.0)
    variables = flax.init(KEY, x, use_running_average=False)
    assert jax.tree.map(jnp.shape, ours.init(KEY, x, use_running_average=False)) == jax.tree.map(
        jnp.shape, variables
    )
    for _ in range(3):
        y, updates = ours.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        expected, changed = flax.apply(
            variables, x, use_running_average=False, mutable=["batch_stats"]
        )
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, changed)
        variables = {**variables, **updates}
    y = ours.apply(variables, x, use_running_average=True)
    expected = flax.apply(variables, x, use_running_average=True)
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

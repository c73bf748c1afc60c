"""Pitfalls of batch normalization: what other libraries do with each, then what bnjax does.

Each test asserts the other library's behaviour too, so it fails once that is repaired.
"""

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from reference import batch_norm, relative_error

import bnjax
from bnjax import functional
from bnjax.functional import BatchStats, batch_norm_eval, batch_norm_train

pytestmark = pytest.mark.usefixtures("all_optimizations")

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
    assert relative_error(mean_of_means, mean) > 0.25
    assert relative_error(y, expected) < 1e-6
    assert relative_error(stats["mean"], [mean, mean]) < 1e-6
    assert relative_error(stats["var"], [var, var]) < 1e-6


@pytest.mark.parametrize(("batches", "error"), [(1, 0.9), (100, 0.2)])
def test_debiased_running_variance(batches, error):
    """Equinox's mode "batch" (equinox#948) divides by 1 - momentum^t as if the variance started at
    0, but it starts at 1: the result is momentum^t / (1 - momentum^t) too large, 99 at first."""
    eqx = pytest.importorskip("equinox")
    x = normal((64, 4), offset=3.0)
    expected, mean, var = batch_norm(x, 1, 0)
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, "batch", mode="batch")
    over_batch = {"axis_name": "batch", "in_axes": (0, None), "out_axes": (0, None)}
    forward = eqx.filter_jit(jax.vmap(layer, **over_batch))
    ours = jax.jit(batch_norm_train, static_argnames="momentum")
    moving = average = fresh_stats(4)
    for _ in range(batches):
        _, state = forward(x, state)
        _, moving = ours(x, None, None, moving, momentum=0.99)
        _, average = ours(x, None, None, average, momentum=None)

    theirs, _ = jax.vmap(eqx.nn.inference_mode(layer), **over_batch)(x, state)
    keep = 0.99**batches
    too_large = var + keep / (1 - keep)
    assert relative_error(theirs, (x - mean) / np.sqrt(too_large + 1e-5)) < 1e-4
    assert relative_error(theirs, expected) == pytest.approx(error, rel=0.05)

    y = batch_norm_eval(jnp.asarray(x), None, None, average)
    assert relative_error(y, expected) < 1e-6
    assert relative_error(moving.mean, (1 - keep) * mean) < 1e-5
    assert relative_error(moving.var, keep + (1 - keep) * var) < 1e-5


def test_a_batch_of_one():
    """One row has no variance: PyTorch raises (pytorch#4534), Flax returns the bias whatever the
    row is and pulls the running variance towards 0."""
    torch = pytest.importorskip("torch")
    x, bias = normal((1, 3)), np.array([1.0, 2.0, 3.0], np.float32)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        torch.nn.BatchNorm1d(3)(torch.from_numpy(x))
    layer = nn.BatchNorm(use_running_average=False, momentum=0.9, use_scale=False)
    variables = layer.init(KEY, x)
    variables["params"]["bias"] = jnp.asarray(bias)
    y, stats = train(layer, x, variables)
    np.testing.assert_array_equal(y, bias[None])
    np.testing.assert_allclose(stats["var"], np.full(3, 0.9), rtol=1e-6)

    with pytest.raises(ValueError, match="N = 1"):
        train(bnjax.BatchNorm(use_running_average=False, use_scale=False), x, variables)
    y = bnjax.BatchNorm(use_running_average=True, use_scale=False).apply(variables, x)
    assert relative_error(y, x.astype(np.float64) / np.sqrt(1 + 1e-5) + bias) < 1e-6


def test_a_batch_of_one_that_only_run_time_knows():
    """Exported with a free batch size, Flax's layer counts a batch of one like any other."""
    (n,) = jax.export.symbolic_shape("n")
    found = {}
    for layer in (nn.BatchNorm, bnjax.BatchNorm):
        norm = layer(use_running_average=False, momentum=0.9)
        variables = norm.init(KEY, normal((4, 3)))
        apply = jax.jit(lambda x, norm=norm, variables=variables: train(norm, x, variables))
        exported = jax.export.export(apply)(jax.ShapeDtypeStruct((n, 3), jnp.float32))
        _, found[layer] = exported.call(normal((1, 3), offset=5.0))
    np.testing.assert_allclose(found[nn.BatchNorm]["var"], 0.9, rtol=1e-6)
    assert (found[nn.BatchNorm]["mean"] > 0.3).all()

    np.testing.assert_array_equal(found[bnjax.BatchNorm]["var"], np.ones(3))
    np.testing.assert_array_equal(found[bnjax.BatchNorm]["mean"], np.zeros(3))


def test_a_mask_of_rows_as_long_as_the_features():
    """Flax takes any mask that broadcasts to the input: one of `[N]` rows, where N is also the
    number of features, leaves out features and counts the padded rows, without an error."""
    x = normal((4, 4))
    x[3] = 100.0
    mask = jnp.array([True, True, True, False])
    settings = {"use_running_average": False, "momentum": 0.0}
    _, stats = train(nn.BatchNorm(**settings), x, mask=mask)
    np.testing.assert_allclose(stats["mean"], np.append(x.mean(axis=0)[:3], np.nan), rtol=1e-5)

    y, stats = train(bnjax.BatchNorm(**settings), x, mask=mask)
    expected, mean, _ = batch_norm(x, 1, 0, mask=np.asarray(mask))
    assert relative_error(y, expected) < 1e-6
    assert relative_error(stats["mean"], mean) < 1e-6


def test_biased_or_unbiased_running_variance():
    """PyTorch normalizes with the biased variance and tracks the unbiased one (pytorch#77427),
    Flax tracks the biased one: statistics carried over are off by n / (n - 1)."""
    torch = pytest.importorskip("torch")
    x = normal((5, 3))
    expected, _, biased = batch_norm(x, 1, 0)
    layer = torch.nn.BatchNorm1d(3, momentum=1.0, affine=False)
    assert relative_error(layer(torch.from_numpy(x)), expected) < 1e-6
    assert relative_error(layer.running_var, biased * 5 / 4) < 1e-6
    settings = {"use_running_average": False, "momentum": 0.0}
    _, stats = train(nn.BatchNorm(**settings), x)
    assert relative_error(stats["var"], biased) < 1e-6

    for ddof, tracked in enumerate([biased, biased * 5 / 4]):
        y, stats = train(bnjax.BatchNorm(**settings, ddof=ddof), x)
        assert relative_error(y, expected) < 1e-6
        assert relative_error(stats["var"], tracked) < 1e-6


def test_folding_without_scale_and_offset():
    """PyTorch cannot fuse a linear layer with a batch normalization that has no affine parameters:
    it multiplies by None (pytorch#122183)."""
    torch = pytest.importorskip("torch")
    linear = torch.nn.Linear(6, 3).eval()
    layer = torch.nn.BatchNorm1d(3, affine=False).eval()
    with pytest.raises(TypeError, match="NoneType"):
        torch.nn.utils.fusion.fuse_linear_bn_eval(linear, layer)

    x, kernel, bias, mean = normal((8, 6)), normal((6, 3), seed=1), normal(3, seed=2), normal(3)
    var = np.array([0.5, 1.0, 4.0], np.float32)
    stats = BatchStats(jnp.asarray(mean), jnp.asarray(var))
    expected = (x @ kernel.astype(np.float64) + bias - mean) / np.sqrt(var + 1e-5)
    folded = functional.fold(
        jnp.asarray(kernel), jnp.asarray(bias), None, None, stats, epsilon=1e-5
    )
    kernel, bias = (np.asarray(array, np.float64) for array in folded)
    assert relative_error(x @ kernel + bias, expected) < 1e-6


def test_rematerialization():
    """PyTorch's checkpoint runs the layer once more for the gradient, and that run updates the
    running statistics a second time (pytorch#96136)."""
    torch = pytest.importorskip("torch")
    x = normal((8, 3), offset=1.0)
    mean = x.astype(np.float64).mean(axis=0)
    layer = torch.nn.BatchNorm1d(3, momentum=0.1)
    rows = torch.from_numpy(x).requires_grad_()
    torch.utils.checkpoint.checkpoint(layer, rows, use_reentrant=False).square().sum().backward()
    assert int(layer.num_batches_tracked) == 2
    assert relative_error(layer.running_mean, (1 - 0.9**2) * mean) < 1e-6

    def loss(x, layer):
        y, stats = train(layer(use_running_average=False, momentum=0.9), x)
        return jnp.sum(y**3), stats

    step = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    gradient, stats = step(x, nn.remat(bnjax.BatchNorm))
    same_gradient, same_stats = step(x, bnjax.BatchNorm)
    assert relative_error(stats["mean"], 0.1 * mean) < 1e-6
    np.testing.assert_allclose(gradient, same_gradient, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), stats, same_stats)


def test_vmap_over_the_examples():
    """Mapped over examples without an axis name, Flax normalizes each example by itself, which
    leaves nothing but the bias (flax#1247 asks how to map such models)."""
    x = normal((16, 3))

    def run(layer):
        variables = layer.init(KEY, jnp.asarray(x))
        step = jax.vmap(lambda row: train(layer, row[None], variables), axis_name="batch")
        y, stats = step(x)
        return y[:, 0], stats

    y, _ = run(nn.BatchNorm(use_running_average=False))
    np.testing.assert_array_equal(y, np.zeros_like(x))

    with pytest.raises(ValueError, match="N = 1"):
        run(bnjax.BatchNorm(use_running_average=False))
    y, stats = run(bnjax.BatchNorm(use_running_average=False, momentum=0.0, axis_name="batch"))
    expected, mean, _ = batch_norm(x, 1, 0)
    assert relative_error(y, expected) < 1e-6
    assert relative_error(stats["mean"], np.tile(mean, (16, 1))) < 1e-6


def test_bfloat16_input():
    """Haiku computes and keeps the statistics in the dtype of the input: in bfloat16 the variance
    of data near 32 comes out negative and the output NaN (haiku#396), and a decay of 0.999 is 1."""
    hk = pytest.importorskip("haiku")
    x = jnp.asarray(normal((64, 8), offset=32.0), jnp.bfloat16)

    def run(decay):
        layer = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, decay)(x, True))
        y, state = layer.apply(*layer.init(KEY, x), KEY, x)
        return y, state["batch_norm/~/var_ema"]["average"]

    y, var = run(decay=0.9)
    assert var.dtype == jnp.bfloat16
    assert var.min() < -1
    assert jnp.isnan(y).any()
    assert jnp.isnan(run(decay=0.999)[1]).all()

    expected, mean, var = batch_norm(x.astype(jnp.float32), 1, 0)
    for momentum in (0.0, 0.999):
        y, stats = train(bnjax.BatchNorm(use_running_average=False, momentum=momentum), x)
        assert stats["var"].dtype == jnp.float32
        assert relative_error(stats["mean"], (1 - momentum) * mean) < 1e-6
        assert relative_error(stats["var"], momentum + (1 - momentum) * var) < 1e-6
        assert relative_error(y.astype(jnp.float32), expected) < jnp.finfo(y.dtype).eps / 2

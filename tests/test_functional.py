from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import PartitionSpec
from jax.test_util import check_grads
from reference import batch_norm, relative_error

from bnjax.functional import BatchStats, batch_norm_eval, batch_norm_train, fold
from bnjax.parallel.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("all_optimizations")


def fresh_stats(features, dtype=jnp.float32):
    return BatchStats(jnp.zeros(features, dtype), jnp.ones(features, dtype))


def normal(shape, offset=0.0, seed=0, dtype=np.float32):
    return (np.random.default_rng(seed).normal(size=shape) + offset).astype(dtype)


@pytest.mark.usefixtures("strict_promotion")
class ShapesTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(shape=[(7, 3), (4, 5, 6, 3)], ddof=[0, 1])
    def test_agrees_with_the_float64_reference(self, shape, ddof):
        x = jnp.asarray(normal(shape, offset=2.0))
        scale, bias = jnp.array([1.0, 2.0, -3.0]), jnp.array([0.0, 1.0, 0.5])
        stats = BatchStats(jnp.array([1.0, 2.0, 3.0]), jnp.array([4.0, 5.0, 6.0]))
        train = self.variant(partial(batch_norm_train, momentum=0.8, ddof=ddof))
        y, updated = train(x, scale, bias, stats)

        expected, mean, var = batch_norm(x, scale, bias)
        n = x.size // 3
        var = var * n / (n - ddof)
        assert relative_error(y, expected) < 1e-6
        assert relative_error(updated.mean, 0.8 * np.array([1, 2, 3]) + 0.2 * mean) < 1e-6
        assert relative_error(updated.var, 0.8 * np.array([4, 5, 6]) + 0.2 * var) < 1e-6

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(with_scale=[True, False], with_bias=[True, False])
    def test_scale_and_bias_may_be_missing(self, with_scale, with_bias):
        x = jnp.asarray(normal((9, 2)))
        scale = jnp.array([2.0, 3.0]) if with_scale else None
        bias = jnp.array([1.0, -1.0]) if with_bias else None
        y, _ = self.variant(batch_norm_train)(x, scale, bias, fresh_stats(2))
        expected, *_ = batch_norm(x, [2, 3] if with_scale else 1, [1, -1] if with_bias else 0)
        assert relative_error(y, expected) < 1e-6

    @chex.variants(with_jit=True, without_jit=True)
    def test_evaluation_uses_the_running_statistics(self):
        x = jnp.asarray(normal((1, 5, 2)))
        stats = BatchStats(jnp.array([1.0, -1.0]), jnp.array([4.0, 0.25]))
        y = self.variant(batch_norm_eval)(x, jnp.array([2.0, 1.0]), jnp.array([0.5, 0.0]), stats)
        expected = (np.asarray(x, np.float64) - [1, -1]) / np.sqrt(np.array([4, 0.25]) + 1e-5)
        assert relative_error(y, expected * [2, 1] + [0.5, 0]) < 1e-6


def train_plainly(x):
    return batch_norm_train(x, None, None, fresh_stats(x.shape[-1]), momentum=0.0)


def train_under_vmap(x):
    y, stats = jax.vmap(train_plainly)(jnp.stack([x, x]))
    return y[1], BatchStats(stats.mean[1], stats.var[1])


def train_with_mask(x):
    mask = jnp.ones(len(x), bool)
    stats = fresh_stats(x.shape[-1])
    return batch_norm_train(x, None, None, stats, momentum=0.0, mask=mask)


def train_on_unequal_devices(x):
    each = len(x) // 2 + 2
    padded = jnp.pad(x, ((0, 2 * each - len(x)), (0, 0)), constant_values=jnp.nan)
    mask = jnp.arange(2 * each) < len(x)

    def train(x, mask):
        stats = fresh_stats(x.shape[-1])
        return batch_norm_train(x, None, None, stats, momentum=0.0, mask=mask, axis_name="devices")

    y, stats = jax.vmap(train, axis_name="devices")(
        padded.reshape(2, each, -1), mask.reshape(2, each)
    )
    return y.reshape(2 * each, -1)[: len(x)], BatchStats(stats.mean[1], stats.var[1])


JITTED = [
    jax.jit(train)
    for train in (train_plainly, train_under_vmap, train_with_mask, train_on_unequal_devices)
]


@pytest.mark.parametrize("train", [train_plainly, *JITTED])
@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4, 1e5, -1e5])
@pytest.mark.parametrize("rows", [7, 65, 255, 1000, 65536])
def test_accurate_at_any_offset_and_batch_size(train, offset, rows):
    x = normal((rows, 16), offset, seed=rows)
    y, stats = train(jnp.asarray(x))
    expected, mean, var = batch_norm(x, 1, 0)
    assert relative_error(y, expected) < 1e-6
    assert relative_error(stats.mean, mean) < 1e-6
    assert relative_error(stats.var, var) < 1e-6


def test_a_first_row_far_from_the_rest_does_no_harm():
    x = normal((256, 4), offset=1e4)
    x[0] = -1e4
    y, stats = jax.jit(train_plainly)(jnp.asarray(x))
    expected, _, var = batch_norm(x, 1, 0)
    assert relative_error(y, expected) < 1e-6
    assert relative_error(stats.var, var) < 1e-6


@pytest.mark.usefixtures("x64")
def test_float64_input_has_float64_statistics_and_accuracy():
    x = normal((100, 3), offset=1e5, dtype=np.float64)
    y, stats = train_plainly(jnp.asarray(x))
    expected, mean, _ = batch_norm(x, 1, 0)
    chex.assert_type([y, stats.mean, stats.var], np.float64)
    assert relative_error(y, expected) < 1e-10
    assert relative_error(stats.mean, mean) < 1e-15


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_input_has_float32_statistics(dtype):
    x = jnp.asarray(normal((4096, 3), offset=8.0)).astype(dtype)
    y, stats = jax.jit(train_plainly)(x)
    expected, mean, var = batch_norm(x.astype(jnp.float32), 1, 0)
    assert y.dtype == dtype
    chex.assert_type([stats.mean, stats.var], jnp.float32)
    assert relative_error(stats.mean, mean) < 1e-6
    assert relative_error(stats.var, var) < 1e-6
    assert relative_error(y.astype(jnp.float32), expected) < float(jnp.finfo(dtype).eps)


def test_momentum_none_averages_over_all_batches():
    batches = [normal((10, 2), offset=k, seed=k) for k in range(4)]
    stats = fresh_stats(2)
    for batch in batches:
        _, stats = batch_norm_train(jnp.asarray(batch), None, None, stats, momentum=None, ddof=1)
    assert int(stats.count) == 4
    assert relative_error(stats.mean, np.mean([b.mean(0) for b in batches], axis=0)) < 1e-6
    assert relative_error(stats.var, np.mean([b.var(0, ddof=1) for b in batches], axis=0)) < 1e-6


class MaskTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(0, 1)
    def test_masked_rows_have_no_influence_even_when_nan(self, ddof):
        valid = normal((6, 3), offset=5.0)
        x = np.full((10, 3), np.nan, np.float32)
        mask = np.array([1, 0, 1, 1, 0, 0, 1, 1, 0, 1], bool)
        x[mask] = valid
        scale, bias = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 0.0, -1.0])
        weights = jnp.asarray(normal((10, 3), seed=1))

        def run(x, scale, bias, weights, mask=None):
            y, stats = batch_norm_train(x, scale, bias, fresh_stats(3), ddof=ddof, mask=mask)
            return jnp.sum(y * weights) + jnp.sum(stats.mean + stats.var), (y, stats)

        run = self.variant(jax.grad(run, argnums=(0, 1, 2), has_aux=True))
        gradients, (y, stats) = run(jnp.asarray(x), scale, bias, weights, mask)
        expected, (y_alone, stats_alone) = run(jnp.asarray(valid), scale, bias, weights[mask])

        chex.assert_trees_all_close(stats, stats_alone, rtol=1e-6)
        np.testing.assert_allclose(y[mask], y_alone, rtol=1e-5, atol=1e-6)
        assert not y[~mask].any()
        np.testing.assert_allclose(gradients[0][mask], expected[0], rtol=1e-5, atol=1e-6)
        assert not gradients[0][~mask].any()
        chex.assert_trees_all_close(gradients[1:], expected[1:], rtol=1e-5, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(valid=[0, 1], momentum=[0.9, None])
    def test_fewer_than_two_valid_rows_leave_the_statistics_alone(self, valid, momentum):
        count = jnp.array(7) if momentum is None else None
        stats = BatchStats(jnp.array([3.0]), jnp.array([2.0]), count)
        train = self.variant(partial(batch_norm_train, momentum=momentum))
        y, updated = train(jnp.full((4, 1), 5.0), None, None, stats, mask=jnp.arange(4) < valid)
        chex.assert_trees_all_equal(updated, stats)
        assert jnp.isfinite(y).all()


def test_devices_with_unequal_counts_are_exact():
    x = normal((8, 3), offset=100.0)
    mask = np.array([1, 1, 1, 1, 1, 0, 0, 1], bool)

    @partial(jax.vmap, axis_name="devices")
    def train(x, mask):
        stats = fresh_stats(3)
        return batch_norm_train(x, None, None, stats, momentum=0.0, mask=mask, axis_name="devices")

    y, stats = train(jnp.asarray(x).reshape(2, 4, 3), jnp.asarray(mask).reshape(2, 4))
    expected, mean, var = batch_norm(x, 1, 0, mask=mask)
    assert relative_error(y.reshape(8, 3), expected) < 1e-6
    assert relative_error(stats.mean, np.stack([mean, mean])) < 1e-6
    assert relative_error(stats.var, np.stack([var, var])) < 1e-6


def test_one_sample_on_each_of_two_devices_is_enough():
    mesh = make_mesh()
    with pytest.raises(ValueError, match="N = 1"):
        jax.shard_map(
            partial(batch_norm_train, axis_name="replicate"),
            mesh=mesh,
            in_specs=(PartitionSpec("replicate"), None, None, PartitionSpec()),
            out_specs=(PartitionSpec("replicate"), PartitionSpec()),
        )(jnp.ones((1, 2)), None, None, fresh_stats(2))
    y, _ = jax.vmap(
        lambda x: batch_norm_train(x, None, None, fresh_stats(1), axis_name="d"), axis_name="d"
    )(jnp.array([[[1.0]], [[3.0]]]))
    np.testing.assert_allclose(y.ravel(), [-1, 1], rtol=1e-4)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("offset", [pytest.param(0.0, marks=pytest.mark.slow), 3.0])
def test_derivatives_to_second_order_in_both_modes(masked, offset):
    x = jnp.asarray(normal((6, 2), offset, dtype=np.float64))
    mask = jnp.array([1, 1, 0, 1, 1, 1], bool) if masked else None
    scale, bias = jnp.array([1.5, -0.5]), jnp.array([0.1, 0.2])

    def run(x, scale, bias):
        y, stats = batch_norm_train(x, scale, bias, fresh_stats(2, jnp.float64), mask=mask, ddof=1)
        return jnp.sin(y), stats.mean, jnp.log(stats.var)

    check_grads(run, (x, scale, bias), order=2, modes=["fwd", "rev"], rtol=1e-6, atol=1e-6)


def naive(x, scale, bias, mask=None):
    """Training mode from plain means, for autodiff without a custom rule."""
    weights = jnp.ones((len(x), 1), x.dtype) if mask is None else mask[:, None].astype(x.dtype)
    mean = (weights * x).sum(axis=0) / weights.sum()
    centred = x - mean[None]
    var = (weights * jnp.square(centred)).sum(axis=0) / weights.sum()
    y = scale[None] * centred / jnp.sqrt(var + 1e-5)[None] + bias[None]
    return weights * y, BatchStats(mean, var)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mask", [None, np.array([1, 0, 1, 1, 1], bool)])
def test_hessian_is_that_of_plain_autodiff(mask):
    arguments = [jnp.asarray(normal(s, 1.0, dtype=np.float64)) for s in ((5, 2), 2, 2)]
    stats = fresh_stats(2, jnp.float64)
    ours = partial(batch_norm_train, stats=stats, momentum=0.0, mask=mask)

    def loss(train, *arguments):
        y, (mean, var, _) = train(*arguments)
        return jnp.sum(jnp.sin(y)) + jnp.sum(mean * jnp.log(var))

    hessians = [
        jax.jit(jax.hessian(partial(loss, train), argnums=(0, 1, 2)))(*arguments)
        for train in (ours, partial(naive, mask=mask))
    ]
    chex.assert_trees_all_close(*hessians, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("x64")
def test_checkpoint_leaves_the_gradient():
    x = jnp.asarray(normal((6, 2), dtype=np.float64))

    def loss(train, x):
        y, stats = train(x, None, None, fresh_stats(2, jnp.float64))
        return jnp.sum(jnp.sin(y)) + jnp.sum(stats.var)

    gradients = [
        jax.grad(partial(loss, train))(x)
        for train in (batch_norm_train, jax.checkpoint(batch_norm_train))
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-13, atol=1e-15)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("momentum", [0.9, None])
def test_scan_and_vmap_equal_the_loop(momentum):
    batches = jnp.asarray(normal((4, 6, 3), offset=2.0, dtype=np.float64))
    count = jnp.array(0, jnp.int32) if momentum is None else None
    first = fresh_stats(3, jnp.float64)._replace(count=count)

    def step(stats, x):
        y, stats = batch_norm_train(x, None, None, stats, momentum=momentum)
        return stats, y

    last, y = jax.lax.scan(step, first, batches)
    stats, in_turn = first, []
    for x in batches:
        stats, result = step(stats, x)
        in_turn.append(result)
    chex.assert_trees_all_close((last, y), (stats, jnp.stack(in_turn)), rtol=1e-13)

    apart = [step(first, x) for x in batches]
    mapped = jax.vmap(step, in_axes=(None, 0))(first, batches)
    chex.assert_trees_all_close(mapped, jax.tree.map(lambda *a: jnp.stack(a), *apart), rtol=1e-13)


def dense(x, kernel):
    return jax.lax.dot(x, kernel, precision="highest")


def convolution(x, kernel):
    layout = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=layout, precision="highest"
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("missing", [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize(
    ("linear", "shape", "kernel_shape"),
    [(dense, (8, 6), (6, 4)), (convolution, (2, 5, 5, 6), (3, 3, 6, 4))],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-14)])
def test_folding_merges_normalization_into_the_linear_layer(
    linear, shape, kernel_shape, missing, dtype, tolerance
):
    x, kernel = jnp.asarray(normal(shape, dtype=dtype)), normal(kernel_shape, seed=1, dtype=dtype)
    vectors = [jnp.asarray(normal(4, seed=2 + k, dtype=dtype)) for k in range(4)]
    bias, scale, offset = (None if k in missing else vectors[k] for k in range(3))
    stats = BatchStats(vectors[3], jnp.array([0.1, 1.0, 2.0, 9.0], dtype))

    def add(y, bias):
        return y if bias is None else y + jnp.expand_dims(bias, range(y.ndim - 1))

    before = add(linear(x, kernel), bias)
    expected = batch_norm_eval(before, scale, offset, stats, epsilon=1e-3)
    folded, folded_bias = fold(jnp.asarray(kernel), bias, scale, offset, stats, epsilon=1e-3)
    chex.assert_type([folded, folded_bias], dtype)
    assert relative_error(add(linear(x, folded), folded_bias), expected) < tolerance


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": jnp.ones(3, jnp.float32)}, r"kernel is float32\[3\]: expected floating point"),
        ({"kernel": jnp.ones((2, 3), jnp.int32)}, r"kernel is int32\[2, 3\]"),
        ({"bias": jnp.ones(2)}, r"bias has shape \(2,\): kernel of shape \(2, 3\) needs \(3,\)"),
        ({"scale": jnp.ones((1, 3))}, r"scale has shape \(1, 3\)"),
        ({"offset": jnp.ones(1)}, r"offset has shape \(1,\)"),
        ({"stats": fresh_stats(2)}, r"stats.mean has shape \(2,\)"),
    ],
)
def test_what_cannot_be_folded_is_refused(change, message):
    arguments = {"kernel": jnp.ones((2, 3)), "bias": None, "scale": None, "offset": None}
    with pytest.raises(ValueError, match=message):
        fold(**({**arguments, "stats": fresh_stats(3)} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((1, 3))}, r"N = 1 in x of shape \(1, 3\): use a larger batch"),
        ({"x": jnp.ones((0, 3))}, "N = 0"),
        ({"x": jnp.ones(3, jnp.float32)}, r"float32\[3\]: expected floating point"),
        ({"x": jnp.ones((4, 3), jnp.int32)}, r"int32\[4, 3\]: expected floating point"),
        ({"scale": jnp.ones(2)}, r"scale has shape \(2,\): x of shape \(4, 3\) needs \(3,\)"),
        ({"bias": jnp.ones((1, 3))}, r"bias has shape \(1, 3\)"),
        ({"stats": fresh_stats(4)}, r"stats.mean has shape \(4,\)"),
        ({"mask": jnp.ones(3, bool)}, r"mask has shape \(3,\) .* needs \(4,\)"),
        ({"mask": jnp.ones(4, jnp.float32)}, r"mask .* dtype float32: .* and bool"),
        ({"ddof": 2}, "ddof is 2: expected 0"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"x": jnp.ones((4, 3)), "scale": None, "bias": None, "stats": fresh_stats(3)}
    with pytest.raises(ValueError, match=message):
        batch_norm_train(**(arguments | change))


@pytest.mark.parametrize("ddof", [0, 1])
def test_agrees_with_torch(ddof):
    torch = pytest.importorskip("torch")
    layer = torch.nn.BatchNorm1d(4)
    stats = fresh_stats(4)
    for seed in range(3):
        x = normal((20, 4), offset=3.0, seed=seed)
        expected = layer(torch.tensor(x)).detach().numpy()
        y, stats = batch_norm_train(jnp.asarray(x), None, None, stats, ddof=ddof)
        assert relative_error(y, expected) < 1e-6
    assert relative_error(stats.mean, layer.running_mean.numpy()) < 1e-6
    same_variance = relative_error(stats.var, layer.running_var.numpy()) < 1e-6
    assert same_variance == (ddof == 1)

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import batch_norm, relative_error

from bnjax.cs231n import (
    batchnorm_backward,
    batchnorm_backward_alt,
    batchnorm_forward,
    layernorm_backward,
    layernorm_forward,
)

TRAIN = {"mode": "train"}
PASSES = [
    (batchnorm_forward, batchnorm_backward),
    (batchnorm_forward, batchnorm_backward_alt),
    (layernorm_forward, layernorm_backward),
]
float64 = pytest.mark.usefixtures("x64")
each_pass = pytest.mark.parametrize(("forward", "backward"), PASSES)


def problem(seed=0, n=12, d=5):
    """x, gamma, beta and dout in NumPy."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in ((n, d), (d,), (d,), (n, d))]


def assert_close(actual, expected, tolerance):
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) < tolerance


@float64
@pytest.mark.parametrize("settings", [{}, {"eps": 0.1}])
def test_forward_normalizes_columns_or_rows(settings):
    x, gamma, beta, _ = problem()
    epsilon = settings.get("eps", 1e-5)
    out, *_ = batchnorm_forward(x, gamma, beta, {**TRAIN, **settings})
    assert relative_error(out, batch_norm(x, gamma, beta, epsilon)[0]) < 1e-14
    out, _ = layernorm_forward(x, gamma, beta, settings)
    expected, *_ = batch_norm(x.T, gamma[:, None], beta[:, None], epsilon)
    assert relative_error(out, expected.T) < 1e-14


@float64
@each_pass
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_backward_is_the_vjp_of_forward(forward, backward, eps):
    x, gamma, beta, dout = problem()
    param = {**TRAIN, "eps": eps}
    _, cache, *_ = forward(x, gamma, beta, param)
    _, vjp = jax.vjp(lambda *arguments: forward(*arguments, param)[0], x, gamma, beta)
    assert_close(backward(dout, cache), vjp(dout), 1e-14)


@float64
@each_pass
def test_backward_agrees_with_central_differences(forward, backward):
    x, gamma, beta, dout = problem()
    arguments = [x, gamma, beta]
    _, cache, *_ = forward(*arguments, TRAIN)
    for k, gradient in enumerate(backward(dout, cache)):

        def slope(step, k=k):
            ahead, behind = (
                jnp.vdot(forward(*arguments[:k], moved, *arguments[k + 1 :], TRAIN)[0], dout)
                for moved in (arguments[k] + step, arguments[k] - step)
            )
            return (ahead - behind) / 2e-5

        steps = 1e-5 * jnp.eye(gradient.size).reshape(-1, *gradient.shape)
        assert relative_error(gradient.ravel(), jax.vmap(slope)(steps)) < 1e-9


@float64
@each_pass
def test_forward_and_backward_agree_with_torch(forward, backward):
    torch = pytest.importorskip("torch")
    normalize = torch.nn.functional
    x, gamma, beta, dout = problem()
    leaves = [torch.tensor(a, requires_grad=True) for a in (x, gamma, beta)]
    if forward is layernorm_forward:
        expected = normalize.layer_norm(leaves[0], (5,), *leaves[1:], eps=1e-3)
    else:
        expected = normalize.batch_norm(leaves[0], None, None, *leaves[1:], training=True, eps=1e-3)
    expected.backward(torch.tensor(dout))
    out, cache, *_ = forward(x, gamma, beta, {**TRAIN, "eps": 1e-3})
    assert relative_error(out, expected.detach()) < 1e-14
    assert_close(backward(dout, cache), [leaf.grad for leaf in leaves], 1e-14)


@float64
@pytest.mark.parametrize("settings", [{}, {"momentum": 0.5, "eps": 0.1}])
def test_running_statistics_start_at_zero_and_serve_mode_test(settings):
    keep, epsilon = settings.get("momentum", 0.9), settings.get("eps", 1e-5)
    bn_param, mean, var = {**TRAIN, **settings}, np.zeros(5), np.zeros(5)
    for seed in range(4):
        x, gamma, beta, dout = problem(seed)
        _, _, bn_param = batchnorm_forward(x, gamma, beta, bn_param)
        mean = keep * mean + (1 - keep) * x.mean(axis=0)
        var = keep * var + (1 - keep) * x.var(axis=0)
    running = [bn_param["running_mean"], bn_param["running_var"]]
    assert_close(running, [mean, var], 1e-14)

    out, cache, after = batchnorm_forward(x[:1], gamma, beta, {**bn_param, "mode": "test"})
    assert relative_error(out, gamma * (x[:1] - mean) / np.sqrt(var + epsilon) + beta) < 1e-14
    assert after == {**bn_param, "mode": "test"}
    assert cache is None
    for backward in (batchnorm_backward, batchnorm_backward_alt, layernorm_backward):
        with pytest.raises(ValueError, match=r"cache is None: expected .* mode 'train'"):
            backward(dout, cache)


@pytest.mark.parametrize(
    ("x", "bn_param", "message"),
    [
        (np.ones((4, 3)), {}, "mode is None: expected 'train' or 'test'"),
        (np.ones((4, 3)), {"mode": "eval"}, "mode is 'eval': expected 'train' or 'test'"),
        (np.ones(3), TRAIN, r"x has shape \(3,\): expected \[N, D\]"),
        (np.ones((2, 4, 3)), TRAIN, r"x has shape \(2, 4, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused(x, bn_param, message):
    with pytest.raises(ValueError, match=message):
        batchnorm_forward(x, np.ones(3), np.ones(3), bn_param)


@pytest.mark.parametrize("mode", ["train", "test"])
def test_arguments_are_left_alone(mode):
    running = {"running_mean": np.full(5, 2.0), "running_var": np.full(5, 3.0)}
    arguments = [*problem()[:3], {"mode": mode, **running}]
    before = copy.deepcopy(arguments)
    *_, after = batchnorm_forward(*arguments)
    np.testing.assert_equal(arguments, before)
    assert after is not arguments[3]
    assert (after["running_mean"] == 2).all() == (mode == "test")


@float64
@pytest.mark.parametrize("backward", [batchnorm_backward, batchnorm_backward_alt])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_axis_and_shape_make_a_spatial_group_normalization(backward, groups):
    torch = pytest.importorskip("torch")
    n, c, h, w = shape = 3, 6, 4, 5
    rng = np.random.default_rng(groups)
    x, dout = rng.normal(size=shape), rng.normal(size=shape)
    gamma, beta = rng.normal(size=c), rng.normal(size=c)

    def columns(array):
        return array.reshape(n * groups, -1).T

    def tiled(vector):
        return columns(np.tile(vector[None, :, None, None], (n, 1, h, w)))

    bn_param = {**TRAIN, "axis": (0, 1, 3), "shape": (w, h, c, n)}
    out, cache, _ = batchnorm_forward(columns(x), tiled(gamma), tiled(beta), bn_param)
    dx, dgamma, dbeta = backward(columns(dout), cache)

    leaves = [torch.tensor(a, requires_grad=True) for a in (x, gamma, beta)]
    expected = torch.nn.functional.group_norm(leaves[0], groups, *leaves[1:])
    expected.backward(torch.tensor(dout))
    assert relative_error(out.T.reshape(shape), expected.detach()) < 1e-14
    gradients = dx.T.reshape(shape), dgamma, dbeta
    assert_close(gradients, [leaf.grad for leaf in leaves], 1e-14)


@each_pass
@pytest.mark.parametrize("numpy_dtype", [np.float32, np.float64])
def test_float32_is_as_accurate_as_it_can_be(forward, backward, numpy_dtype):
    *arguments, dout = problem()
    with jax.enable_x64(True):
        expected, cache, *_ = forward(*arguments, TRAIN)
        expected_gradients = backward(dout, cache)
    with jax.enable_x64(False):
        out, cache, *_ = forward(*(a.astype(numpy_dtype) for a in arguments), TRAIN)
        gradients = backward(dout.astype(numpy_dtype), cache)
    assert {a.dtype for a in (out, *gradients)} == {np.dtype(np.float32)}
    assert_close([out, *gradients], [expected, *expected_gradients], 1e-6)


@float64
@each_pass
def test_both_passes_compile_together_and_apart(forward, backward):
    *arguments, dout = problem()

    def run(*arguments):
        return forward(*arguments, TRAIN)[:2]

    @jax.jit
    def both(*arguments):
        return backward(dout, run(*arguments)[1])

    out, cache = run(*arguments)
    expected = backward(dout, cache)
    compiled_out, compiled_cache = jax.jit(run)(*arguments)
    assert relative_error(compiled_out, out) < 1e-14
    assert_close(jax.jit(backward)(dout, compiled_cache), expected, 1e-14)
    assert_close(both(*arguments), expected, 1e-14)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax import initializers, models

KEY = jax.random.key(0)


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def plain_forward(variables, x, activation):
    """Evaluation mode in NumPy: Dense, normalization where there is one, activation."""
    params, stats = variables["params"], variables.get("batch_stats", {})
    features = []
    for k in range(2):
        x = x @ params[f"Dense_{k}"]["kernel"] + params[f"Dense_{k}"]["bias"][None]
        if f"BatchNorm_{k}" in stats:
            s, p = stats[f"BatchNorm_{k}"], params[f"BatchNorm_{k}"]
            x = (x - s["mean"][None]) / np.sqrt(s["var"][None] + 1e-5)
            x = x * p["scale"][None] + p["bias"][None]
        x = activation(x)
        features.append(x)
    return x @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"][None], features


@pytest.mark.parametrize("use_batch_norm", [True, False])
@pytest.mark.parametrize("name", ["relu", "tanh", "sigmoid"])
def test_logits_and_features_agree_with_numpy(use_batch_norm, name):
    activation = models.activation(name)
    model = models.MLP((6, 5), 4, use_batch_norm, activation)
    x = normal((7, 3, 2))
    variables = model.init(KEY, x, train=True)
    _, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
    variables = {**variables, **updates}
    logits, features = model.apply(variables, x, train=False, return_features=True)
    expected, expected_features = plain_forward(variables, x.reshape(7, 6), activation)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert [f.shape for f in features] == [(7, 6), (7, 5)]
    for ours, theirs in zip(features, expected_features, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(model.apply(variables, x, train=False), logits)


def test_running_statistics_follow_pytorch():
    model = models.MLP((5,), 3)
    x = normal((8, 4))
    variables = model.init(KEY, x, train=True)
    _, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
    dense = variables["params"]["Dense_0"]
    before = np.asarray(x @ dense["kernel"] + dense["bias"][None])
    stats = updates["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], 0.1 * before.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * before.var(0, ddof=1), rtol=1e-5)


def test_the_twin_has_the_same_dense_layers_and_no_statistics():
    x = jnp.zeros((2, 784))
    with_bn = models.MLP().init(KEY, x, train=True)
    without = models.MLP(use_batch_norm=False).init(KEY, x, train=True)
    assert set(without) == {"params"}
    dense = {k: v for k, v in with_bn["params"].items() if k.startswith("Dense")}
    assert jax.tree.map(jnp.shape, dense) == jax.tree.map(jnp.shape, without["params"])


def test_a_dense_bias_before_normalization_has_no_gradient():
    with jax.enable_x64(True):
        model = models.MLP((6,), 3)
        x = jnp.asarray(np.random.default_rng(0).normal(size=(9, 4)))
        variables = jax.tree.map(lambda a: a.astype(jnp.float64), model.init(KEY, x, train=True))

        def loss(params):
            variables_ = {**variables, "params": params}
            logits, _ = model.apply(variables_, x, train=True, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(logits))

        gradient = jax.grad(loss)(variables["params"])
        assert np.abs(gradient["Dense_0"]["bias"]).max() < 1e-12
        assert np.abs(gradient["Dense_1"]["bias"]).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("torch_default", 1 / np.sqrt(3 * 400)),
        ("xavier_uniform", np.sqrt(2 / 600)),
        ("xavier_normal", np.sqrt(2 / 600)),
        ("he_uniform", np.sqrt(2 / 400)),
        ("he_normal", np.sqrt(2 / 400)),
        ("normal(0.05)", 0.05),
    ],
)
def test_kernels_have_the_published_spread(name, std):
    kernel = initializers.kernel(name)(KEY, (400, 200), jnp.float32)
    assert abs(kernel.std() / std - 1) < 0.01
    assert abs(kernel.mean()) < 4 * std / np.sqrt(kernel.size)
    if "normal" not in name:
        bound = np.sqrt(3) * std
        assert 0.999 * bound < abs(kernel).max() <= bound * (1 + 1e-6)


def test_torch_default_matches_torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    theirs = torch.nn.Linear(100, 2000)
    kernel = initializers.torch_default(KEY, (100, 2000), jnp.float32)
    bias = initializers.torch_default_bias(100)(KEY, (2000,))
    for ours, other in ((kernel, theirs.weight), (bias, theirs.bias)):
        assert abs(float(other.detach().std()) / ours.std() - 1) < 0.03
        assert abs(float(other.detach().abs().max()) / abs(ours).max() - 1) < 0.01


def test_model_starts_with_pytorch_biases():
    variables = models.MLP((50,), 10).init(KEY, jnp.zeros((2, 400)), train=True)
    bias = variables["params"]["Dense_0"]["bias"]
    assert 0.9 / 20 < abs(bias).max() <= 1 / 20


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: initializers.kernel("he_norml"), "did you mean 'he_normal'"),
        (lambda: initializers.kernel("normal(x)"), r"expected a number, as in normal\(0.05\)"),
        (lambda: initializers.kernel("normal(0)"), "must be positive and finite"),
        (lambda: initializers.kernel("normal(nan)"), "must be positive and finite"),
        (lambda: models.activation("rulu"), "did you mean 'relu'"),
    ],
)
def test_unknown_names_are_refused_with_a_suggestion(call, message):
    with pytest.raises(ValueError, match=message):
        call()

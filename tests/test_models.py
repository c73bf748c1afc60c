import re
from collections import Counter
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import norm_of
from reference import relative_error

from bnjax import BatchNorm, initializers, models, training

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
    model = models.MLP((6, 5), 4, "batch" if use_batch_norm else None, activation)
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
    without = models.MLP(norm=None).init(KEY, x, train=True)
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


def operations(model, variables, x):
    """How often each primitive occurs in evaluation mode."""
    program = jax.make_jaxpr(lambda x: model.apply(variables, x, train=False))(x)
    return Counter(re.findall(r" = (\w+)", str(program)))


@pytest.mark.parametrize("name", ["relu", pytest.param("tanh", marks=pytest.mark.slow)])
@pytest.mark.parametrize("hidden_sizes", [(6,), (6, 5), (6, 5, 4)])
def test_folding_leaves_the_logits_and_no_normalization(name, hidden_sizes):
    model = models.MLP(hidden_sizes, 3, activation=models.activation(name))
    x = normal((40, 7))
    state = training.create_state(model, optax.adam(0.05), KEY, x)
    for seed in range(5):
        batch = training.Batch(2 * normal((16, 7), seed) + 1, jnp.arange(16) % 3)
        state, _ = training.train_step(state, batch)
    folded, variables = models.fold_batch_norm(model, state.variables)
    assert folded.norm is None
    assert set(variables) == {"params"}
    expected = model.apply(state.variables, x, train=False)
    assert relative_error(folded.apply(variables, x, train=False), expected) < 1e-6

    plain = models.MLP(hidden_sizes, 3, None, models.activation(name))
    plain_variables = plain.init(KEY, x, train=False)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, plain_variables)
    left = operations(folded, variables, x)
    assert left == operations(plain, plain_variables, x)
    normalization = {"sqrt", "rsqrt", "div"}
    assert normalization & set(operations(model, state.variables, x))
    assert not normalization & set(left)


def test_only_batch_normalization_can_be_folded():
    model = models.MLP((6,), 3, norm=None)
    with pytest.raises(ValueError, match="nothing to fold"):
        models.fold_batch_norm(model, model.init(KEY, jnp.ones((2, 4)), train=True))


@pytest.mark.parametrize("rate", [0.5, 0.2])
def test_dropout_zeroes_a_share_of_the_features_and_scales_the_rest(rate):
    model = models.MLP((200,), 200, None, models.activation("sigmoid"), dropout_rate=rate)
    x = normal((100, 5))
    variables = model.init(KEY, x, train=True)
    identity = {"kernel": jnp.eye(200), "bias": jnp.zeros(200)}
    variables["params"]["Dense_1"] = identity

    def train(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply(variables, x, train=True, rngs=rngs, return_features=True)

    dropped, (features,) = train(0)
    kept = dropped != 0
    assert abs(kept.mean() - (1 - rate)) < 0.02
    np.testing.assert_allclose(dropped[kept], features[kept] / (1 - rate), rtol=1e-6)
    assert abs(dropped.mean() / features.mean() - 1) < 0.02
    np.testing.assert_array_equal(train(0)[0], dropped)
    assert (train(1)[0] != dropped).any()

    evaluated, (same_features,) = model.apply(variables, x, train=False, return_features=True)
    np.testing.assert_array_equal(features, same_features)
    np.testing.assert_allclose(evaluated, features, rtol=1e-6)


@pytest.mark.parametrize("rate", [-0.1, 1.0, np.nan])
def test_a_dropout_rate_outside_its_range_is_refused(rate):
    with pytest.raises(ValueError, match=rf"dropout_rate is {rate}: expected in \[0, 1\)"):
        models.MLP(dropout_rate=rate).init(KEY, jnp.ones((2, 4)), train=True)


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


@pytest.mark.parametrize(
    ("hidden_sizes", "told"),
    [
        ((5,), "BatchNorm_1, Dense_1, Dense_2"),
        ((5, 5, 5), "BatchNorm_2, Dense_2, Dense_3"),
        ((5, 6), "of another shape: BatchNorm_1, Dense_1, Dense_2"),
        ((), "Dense_1"),
    ],
)
def test_fold_refuses_the_variables_of_another_network(hidden_sizes, told):
    variables = models.MLP((5, 5), 3).init(KEY, normal((2, 4)), train=True)
    with pytest.raises(ValueError, match=told):
        models.fold_batch_norm(models.MLP(hidden_sizes, 3), variables)


def test_fold_of_no_hidden_layer_changes_nothing():
    variables = models.MLP((), 3).init(KEY, normal((2, 4)), train=True)
    _, folded = models.fold_batch_norm(models.MLP((), 3), variables)
    assert folded["params"]["Dense_0"] is variables["params"]["Dense_0"]


@pytest.mark.parametrize(
    ("use_scale", "use_bias"), [(True, True), (True, False), (False, True), (False, False)]
)
@pytest.mark.parametrize(
    ("layer", "momentum"), [(BatchNorm, 0.9), (BatchNorm, None), (nn.BatchNorm, 0.9)]
)
@pytest.mark.parametrize("epsilon", [1e-3, 0.5])
def test_folding_uses_the_settings_of_the_layers(layer, momentum, epsilon, use_scale, use_bias):
    norm = partial(layer, momentum=momentum, epsilon=epsilon)
    norm = partial(norm, use_scale=use_scale, use_bias=use_bias)
    model, x = models.MLP((6, 5), 3, norm_of(norm)), normal((40, 7))
    variables = model.init(KEY, x, train=True)
    _, updates = model.apply(variables, 3 * x, train=True, mutable=["batch_stats"])
    params = jax.tree.map(lambda a: a + 0.1 * normal(a.shape), variables["params"])
    variables = {"params": params, **updates}
    folded, merged = models.fold_batch_norm(model, variables)
    found = folded.apply(merged, x, train=False)
    assert relative_error(found, model.apply(variables, x, train=False)) < 1e-6
    other = model.clone(norm=norm_of(partial(norm, epsilon=1e-5)))
    assert relative_error(found, other.apply(variables, x, train=False)) > 1e-4


def test_other_normalizations_are_not_folded():
    def norm(use_running_average):
        return nn.LayerNorm()

    model = models.MLP((6,), 3, norm_of(norm))
    with pytest.raises(ValueError, match="normalizes by LayerNorm: expected BatchNorm"):
        models.fold_batch_norm(model, model.init(KEY, normal((4, 7)), train=True))

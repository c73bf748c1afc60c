import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from reference import relative_error

from bnjax import BatchNorm, initializers, models, norms, torch_interop

KEY = jax.random.key(0)
NAMES = [
    "batch",
    "ghost(4)",
    "renorm",
    "layer",
    "rms",
    "group(2)",
    "mean_only",
    "batch_no_affine",
]
OF_EXAMPLES = ["layer", "rms", "group(2)"]
each_norm = pytest.mark.parametrize("name", NAMES)


def normal(shape, seed=0, offset=0.0):
    return np.random.default_rng(seed).normal(size=shape) + offset


def of_examples(name, x):
    """What `layer`, `rms` and `group(2)` make of `x`, without scale and bias."""
    groups = np.split(x, 2, axis=-1) if name == "group(2)" else [x]
    axes = tuple(range(1, x.ndim))
    if name == "rms":
        return x / np.sqrt(np.mean(x**2, axes, keepdims=True) + 1e-5)
    normalized = [
        (group - group.mean(axes, keepdims=True)) / np.sqrt(group.var(axes, keepdims=True) + 1e-5)
        for group in groups
    ]
    return np.concatenate(normalized, axis=-1)


def of_batch(name, x, mean, var):
    """What the others make of a batch, without scale and bias, and the running statistics then."""
    rows = x.reshape(-1, x.shape[-1])
    batch_mean, batch_var = rows.mean(0), rows.var(0)
    y = x - batch_mean
    if name != "mean_only":
        y = y / np.sqrt(batch_var + 1e-5)
    if name == "renorm":
        r = np.clip(np.sqrt((batch_var + 1e-5) / (var + 1e-5)), 1 / 3, 3)
        y = y * r + np.clip((batch_mean - mean) / np.sqrt(var + 1e-5), -5, 5)
    return y, 0.9 * mean + 0.1 * batch_mean, 0.9 * var + 0.1 * rows.var(0, ddof=1)


def reference(name, x, params, stats, train):
    """The layer in plain float64: the result, and the running statistics after it."""
    x, (params, stats) = np.float64(x), jax.tree.map(np.float64, (params, stats))
    mean, var = stats.get("mean"), stats.get("var", 1.0)
    if name in OF_EXAMPLES:
        y = of_examples(name, x)
    elif not train:
        y = (x - mean) / (1.0 if name == "mean_only" else np.sqrt(var + 1e-5))
    else:
        size = 4 if name == "ghost(4)" else len(x)
        parts = []
        for start in range(0, len(x), size):
            part, mean, var = of_batch(name, x[start : start + size], mean, var)
            parts.append(part)
        y, stats = np.concatenate(parts), {k: {"mean": mean, "var": var}[k] for k in stats}
    return params.get("scale", 1.0) * y + params.get("bias", 0.0), stats


def make_layer(name, x, offset=0.0):
    """Its variables, none of them 0 or 1, the running statistics as after some training."""
    layer = norms.norm(name)(True)
    variables = layer.init(KEY, x)
    moved = jax.tree.map(lambda a: a + 0.3 * normal(a.shape).astype(a.dtype), variables)
    params, stats = moved.get("params", {}), moved.get("batch_stats", {})
    if stats:
        stats = {**stats, "mean": stats["mean"] + jnp.asarray(offset, x.dtype)}
    return params, {k: abs(v) + 0.1 if k == "var" else v for k, v in stats.items()}


def apply(name, x, params, stats, train):
    variables = {"params": params, "batch_stats": stats}
    y, updates = norms.norm(name)(train).apply(variables, x, mutable=["batch_stats"])
    return y, updates.get("batch_stats", {})


def loss(name, x, params, stats, train=True):
    y, _ = apply(name, x, params, stats, train)
    return jnp.sum(jnp.sin(y))


def test_the_names_are_those_of_the_table():
    table = [name.replace("(4)", "(SIZE)").replace("(2)", "(GROUPS)") for name in NAMES]
    assert list(norms.NORMS) == table


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4])
@pytest.mark.parametrize("shape", [(12, 8), (12, 3, 2, 8)])
@each_norm
def test_layers_agree_with_float64(name, shape, offset):
    x = normal(shape, offset=offset).astype(np.float32)
    params, stats = make_layer(name, x, offset)
    # Renorm says how far the batch's mean is from the running one, and that mean is rounded.
    tolerance = 1e-5 + (1e-7 * offset if name == "renorm" else 0)
    run = jax.jit(apply, static_argnums=(0, 4))
    for step in range(3):
        x = normal(shape, step, offset).astype(np.float32)
        for train in (False, True):
            y, updated = run(name, x, params, stats, train)
            expected, expected_stats = reference(name, x, params, stats, train)
            np.testing.assert_allclose(y, expected, rtol=1e-5, atol=tolerance)
            assert updated.keys() == expected_stats.keys()
            for key, value in updated.items():
                np.testing.assert_allclose(value, expected_stats[key], rtol=2e-6, atol=1e-6)
        stats = updated
    assert {k: v.shape for k, v in params.items()} == dict.fromkeys(params, shape[-1:])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("norm_after", [False, True])
@each_norm
def test_networks_agree_with_float64(name, norm_after):
    model = models.MLP((8, 6), 3, name, nn.tanh, norm_after=norm_after)
    variables = jax.tree.map(jnp.float64, model.init(KEY, normal((12, 5)), train=True))
    params, stats = variables["params"], variables.get("batch_stats", {})
    layers = [layer for layer in {**params, **stats} if not layer.startswith("Dense")]
    assert len(layers) == 2
    for step in range(4):
        images, train = normal((12, 5), step), step < 3
        variables = {"params": params, "batch_stats": stats}
        settings = {"train": train, "return_features": True, "mutable": ["batch_stats"]}
        (logits, features), updates = model.apply(variables, images, **settings)
        x, expected = images, {}
        for k, (layer, leaving) in enumerate(zip(sorted(layers), features, strict=True)):
            x = x @ params[f"Dense_{k}"]["kernel"] + params[f"Dense_{k}"]["bias"][None]
            x = np.tanh(x) if norm_after else x
            x, after = reference(name, x, params.get(layer, {}), stats.get(layer, {}), train)
            x = x if norm_after else np.tanh(x)
            expected |= {layer: after} if after else {}
            np.testing.assert_allclose(leaving, x, rtol=1e-9, atol=1e-9)
        x = x @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"][None]
        np.testing.assert_allclose(logits, x, rtol=1e-9, atol=1e-9)
        stats = updates.get("batch_stats", {})
        assert stats.keys() == expected.keys()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), stats, expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "renorm"])  # test_variants.py
def test_derivatives_agree_with_finite_differences(name):
    x = normal((8, 2, 1, 4))
    params, stats = jax.tree.map(jnp.float64, make_layer(name, x))
    function = jax.jit(lambda x, params: loss(name, x, params, stats))
    check_grads(function, (x, params), 1, modes="rev", rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("name", [*OF_EXAMPLES, "mean_only"])
def test_derivatives_are_accurate_far_from_zero(name, offset):
    x = normal((12, 3, 2, 8), offset=offset).astype(np.float32)
    params, stats = make_layer(name, x)
    gradient = jax.jit(jax.grad(loss, argnums=(1, 2)), static_argnums=(0, 4))
    single = gradient(name, x, params, stats, True)
    with jax.enable_x64(True):
        wide = jax.tree.map(np.float64, (x, params, stats))
        double = gradient(name, *wide, True)
    for a, b in zip(jax.tree.leaves(single), jax.tree.leaves(double), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.usefixtures("x64", "strict_promotion")
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("bfloat16", 2**-8), ("float16", 2**-11), ("float32", 1e-6), ("float64", 1e-12)],
)
@each_norm
def test_results_have_the_dtype_of_the_input(name, dtype, tolerance):
    x = jnp.asarray(normal((12, 8)), dtype)
    params, stats = make_layer(name, jnp.asarray(x, jnp.float32))  # as a checkpoint has them
    for train in (True, False):
        y, updated = apply(name, x, params, stats, train)
        assert y.dtype == x.dtype
        expected, _ = reference(name, x, params, stats, train)
        assert relative_error(y, expected) < tolerance
        kinds = {value.dtype for value in updated.values()}
        assert kinds <= {jnp.dtype("float64" if train and dtype == "float64" else "float32")}


class Before(nn.Module):
    """The network as it was when `use_batch_norm` was all that it knew."""

    @nn.compact
    def __call__(self, x, *, train):
        for size in (8, 6, None):
            settings = {
                "kernel_init": initializers.torch_default,
                "bias_init": initializers.torch_default_bias(x.shape[-1]),
            }
            x = nn.Dense(size or 3, **settings)(x)
            if size:
                x = BatchNorm(use_running_average=not train, momentum=0.9, ddof=1)(x)
                x = nn.Dropout(0.3, deterministic=not train)(nn.relu(x))
        return x


def test_batch_is_bit_for_bit_what_it_was():
    x = jnp.asarray(normal((12, 5)), jnp.float32)

    def train(model):
        def step(variables):
            def loss(params):
                given, rngs = {**variables, "params": params}, {"dropout": KEY}
                settings = {"train": True, "rngs": rngs, "mutable": ["batch_stats"]}
                logits, updates = model.apply(given, x, **settings)
                return jnp.sum(jnp.sin(logits)), updates

            gradient, updates = jax.grad(loss, has_aux=True)(variables["params"])
            moved = jax.tree.map(lambda a, b: a - 0.1 * b, variables["params"], gradient)
            return {"params": moved, **updates}

        states = [model.init(KEY, x, train=True)]
        for _ in range(3):
            states.append(jax.jit(step)(states[-1]))
        return states, model.apply(states[-1], x, train=False)

    model = models.MLP((8, 6), 3, norm="batch", dropout_rate=0.3)
    jax.tree.map(np.testing.assert_array_equal, train(model), train(Before()))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bach", "unknown norm 'bach': did you mean 'batch'"),
        ("layers", "unknown norm 'layers': did you mean 'layer'"),
        ("ghots(8)", r"unknown norm 'ghots\(8\)': did you mean 'ghost\(SIZE\)'"),
        ("batch(8)", r"unknown norm 'batch\(8\)': did you mean 'batch'"),
        *(
            (name, r"^norm [^:]*: expected a whole number of at least 1, as in group\(8\)")
            for name in ("group", "group()", "group(0)", "group(-2)", "group(1.5)", "group(GROUPS)")
        ),
        *(
            (name, r"^norm [^:]*: expected a whole number of at least 2, as in ghost\(8\)")
            for name in ("ghost", "ghost(1)", "ghost(SIZE)", "ghost(8, 2)", "ghost(²)")
        ),
    ],
)
def test_other_names_are_refused_in_a_sentence(name, message):
    with pytest.raises(ValueError, match=message):
        norms.norm(name)
    with pytest.raises(ValueError, match=message):
        models.MLP(norm=name).init(KEY, jnp.ones((2, 4)), train=True)


@pytest.mark.parametrize(
    ("name", "x", "message"),
    [
        (
            "group(3)",
            jnp.ones((2, 8)),
            "num_groups is 3: expected a divisor of the 8 features",
        ),
        ("layer", jnp.ones((2, 8), jnp.int32), r"x is int32\[2, 8\]: expected floating point"),
        ("mean_only", jnp.ones((2, 8), jnp.int32), r"x is int32\[2, 8\]: expected floating point"),
        ("rms", jnp.ones(8, jnp.float32), r"x is float32\[8\]: .* \[N, ..., C\]"),
    ],
)
def test_what_cannot_be_normalized_is_refused(name, x, message):
    with pytest.raises(ValueError, match=message):
        norms.norm(name)(True).init(KEY, x)


@pytest.mark.parametrize("name", ["batch", "mean_only"])
@pytest.mark.parametrize("count", [0, 1])
def test_a_batch_needs_two_examples_but_init_none(name, count):
    x = jnp.ones((count, 3))
    layer = norms.norm(name)(True)
    variables = layer.init(KEY, x)
    with pytest.raises(
        ValueError, match=f"needs at least 2 samples per feature, found N = {count}"
    ):
        layer.apply(variables, x, mutable=["batch_stats"])
    assert norms.norm(name)(False).apply(variables, x).shape == x.shape


@pytest.mark.parametrize("name", OF_EXAMPLES)
def test_examples_may_be_missing_where_each_counts_alone(name):
    assert norms.norm(name)(True).init_with_output(KEY, jnp.ones((0, 2, 4)))[0].shape == (0, 2, 4)


@pytest.mark.parametrize("name", [*OF_EXAMPLES, "mean_only"])
def test_pytorch_and_folding_want_batch_normalization(name):
    model = models.MLP((4,), 3, name)
    variables = model.init(KEY, jnp.ones((2, 4)), train=True)
    kind = "MeanOnlyBatchNorm" if name == "mean_only" else "GroupNorm"
    with pytest.raises(ValueError, match=f"normalizes by {kind}: expected BatchNorm$"):
        models.fold_batch_norm(model, variables)
    with pytest.raises(ValueError, match=f"normalizes by {kind}: expected BatchNorm$"):
        torch_interop.from_torch({"0.weight": np.ones((4, 4))}, model)
    with pytest.raises(ValueError, match=f"not those of an MLP; missing or surplus: .*{kind}_0"):
        torch_interop.to_torch(variables)


@pytest.mark.parametrize("name", ["batch", "ghost(4)", "renorm", "batch_no_affine"])
def test_what_has_the_variables_of_batch_normalization_folds_and_goes_to_pytorch(name):
    model, x = models.MLP((6, 5), 3, name), jnp.asarray(normal((12, 4)), jnp.float32)
    variables = model.init(KEY, x, train=True)
    _, updates = model.apply(variables, 3 * x, train=True, mutable=["batch_stats"])
    variables = {**variables, **updates}
    expected = model.apply(variables, x, train=False)
    folded, merged = models.fold_batch_norm(model, variables)
    assert relative_error(folded.apply(merged, x, train=False), expected) < 1e-6
    back = torch_interop.from_torch(torch_interop.to_torch(variables), model)
    np.testing.assert_array_equal(model.apply(back, x, train=False), expected)


def test_normalization_after_the_activation_is_not_folded():
    model = models.MLP((4,), 3, norm_after=True)
    variables = model.init(KEY, jnp.ones((2, 4)), train=True)
    with pytest.raises(ValueError, match=r"does not normalize before its activations$"):
        models.fold_batch_norm(model, variables)

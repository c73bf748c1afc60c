from functools import partial
from itertools import combinations

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import Nested
from reference import relative_error

from bnjax import diagnostics
from bnjax.models import ACTIVATIONS, MLP, Activation
from bnjax.training import Batch

IN_NUMPY = {  # with the derivative
    "relu": (lambda x: np.maximum(x, 0), lambda x: (x > 0) * 1.0),
    "tanh": (np.tanh, lambda x: 1 - np.tanh(x) ** 2),
}

each_mode = pytest.mark.parametrize("train", [False, True])
each_network = pytest.mark.parametrize("use_batch_norm", [False, True])


def in_numpy(variables, images, name, train):
    """Logits, what enters and leaves each activation, and the statistics used, in float64."""
    params, stats = (jax.tree.map(np.float64, variables.get(k)) for k in ("params", "batch_stats"))
    entering, leaving, used = [], [], {}
    x = np.float64(images).reshape(len(images), -1)
    *hidden, last = (params[k] for k in sorted(params) if k.startswith("Dense"))
    for k, dense in enumerate(hidden):
        x = x @ dense["kernel"] + dense["bias"]
        if (norm := f"BatchNorm_{k}") in params:
            used[norm] = {"mean": x.mean(axis=0), "var": x.var(axis=0)} if train else stats[norm]
            x = (x - used[norm]["mean"]) / np.sqrt(used[norm]["var"] + 1e-5)
            x = params[norm]["scale"] * x + params[norm]["bias"]
        entering.append(x)
        x = IN_NUMPY[name][0](x)
        leaving.append(x)
    return x @ last["kernel"] + last["bias"], entering, leaving, used


def loss_in_numpy(params, batch):
    logits, *_ = in_numpy({"params": params}, batch.images, "tanh", train=True)
    own = logits[np.arange(len(logits)), batch.labels]
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - own)


def gradient_in_numpy(params, batch, step=1e-6):
    """Central differences, good to some 1e-9."""
    params = jax.tree.map(np.array, params)
    gradient = jax.tree.map(np.zeros_like, params)
    for w, g in zip(jax.tree.leaves(params), jax.tree.leaves(gradient), strict=True):
        for at in np.ndindex(w.shape):
            here, losses = w[at], []
            for w[at] in (here + step, here - step):
                losses.append(loss_in_numpy(params, batch))
            w[at] = here
            g[at] = (losses[0] - losses[1]) / (2 * step)
    return gradient


def network(name, use_batch_norm=True, hidden_sizes=(6, 5), dtype=np.float64):
    """A model, variables none of which is what it starts with, and a batch."""
    rng = np.random.default_rng(3)
    model = MLP(hidden_sizes, 3, "batch" if use_batch_norm else None, ACTIVATIONS[name])
    images = rng.normal(size=(16, 2, 2)).astype(dtype)
    labels = rng.integers(0, 3, 16, np.int32)
    shapes = jax.eval_shape(partial(model.init, train=True), jax.random.key(0), images)
    draw = {"params": rng.normal, "batch_stats": partial(rng.uniform, 0.5, 2)}
    variables = {
        key: jax.tree.map(lambda a, key=key: draw[key](size=a.shape).astype(dtype), tree)
        for key, tree in shapes.items()
    }
    return model, variables, Batch(images, labels)


def unit(x):
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length, length, 1)


def assert_close(found, expected, tolerance):
    """Both `{name: array}`, with the same names in the same order."""
    assert list(found) == list(expected)
    for name in expected:
        chex.assert_shape(found[name], np.shape(expected[name]))
        assert relative_error(found[name], expected[name]) < tolerance, name


@each_mode
@each_network
@pytest.mark.parametrize("name", IN_NUMPY)
@pytest.mark.usefixtures("x64")
def test_all_layers_agree_with_numpy(name, use_batch_norm, train):
    model, variables, batch = network(name, use_batch_norm)
    _, entering, leaving, _ = in_numpy(variables, batch.images, name, train)

    def check(probe, expected):
        found = probe(model, variables, batch, train=train)
        names = [f"{probe.__name__}_{k}" for k in (1, 2)]
        assert_close(found, dict(zip(names, expected, strict=True)), 1e-13)
        return found.values()

    seen = check(diagnostics.preactivations, entering)
    flat = [np.mean(IN_NUMPY[name][1](x) < 0.5) for x in entering]
    found = [diagnostics.saturation(x, ACTIVATIONS[name], slope=0.5) for x in seen]
    assert found == pytest.approx(flat)
    left = check(diagnostics.features, leaving)
    cosines = [np.mean([a @ b for a, b in combinations(unit(x), 2)]) for x in leaving]
    found = [diagnostics.cosine_similarity(x) for x in left]
    assert found == pytest.approx(cosines, rel=1e-12)
    ranks = [np.linalg.matrix_rank(x, tol=0.2 * np.linalg.norm(x, 2)) for x in leaving]
    assert [diagnostics.effective_rank(x, threshold=0.2) for x in left] == ranks
    assert flat[0] != flat[1]
    assert ranks != [6, 5]


@pytest.mark.usefixtures("x64")
def test_gradient_of_softmax_regression():
    model, variables, batch = network("relu", hidden_sizes=())
    x = batch.images.reshape(16, 4)
    odds = np.exp(in_numpy(variables, x, "relu", train=True)[0])
    errors = odds / odds.sum(axis=1, keepdims=True) - np.eye(3)[batch.labels]
    found = diagnostics.gradient_norms(model, variables, batch)
    assert_close(found, {"Dense_0": np.linalg.norm(x.T @ errors / 16)}, 1e-13)
    found = diagnostics.backpropagated_norms(model, variables, batch)
    assert_close(found, {"Dense_0": np.linalg.norm(errors / 16)}, 1e-13)


@each_network
@pytest.mark.usefixtures("x64")
def test_gradient_norms_agree_with_finite_differences(use_batch_norm):
    model, variables, batch = network("tanh", use_batch_norm)
    params = dict(variables["params"])
    layers = ["Dense_0", "Dense_1", "Dense_2"]
    for k in layers:  # a bias for each example has the gradient of the layer's output
        params[k] = {**params[k], "bias": np.tile(params[k]["bias"], (16, 1))}
    gradient = gradient_in_numpy(params, batch)
    for probe, name in (
        (diagnostics.gradient_norms, "kernel"),
        (diagnostics.backpropagated_norms, "bias"),
    ):
        norms = {k: np.linalg.norm(gradient[k][name]) for k in layers}
        assert_close(probe(model, variables, batch), norms, 1e-7)


@each_network
@pytest.mark.usefixtures("x64")
def test_landscape_at_weights_moved_by_hand(use_batch_norm):
    model, variables, batch = network("tanh", use_batch_norm)
    params, steps = variables["params"], (0.05, 0.0, 2.0)
    here = gradient_in_numpy(params, batch)
    moved = [jax.tree.map(lambda w, g, s=s: w - s * g, params, here) for s in steps]
    gradients = [jax.tree.leaves(gradient_in_numpy(there, batch)) for there in moved]
    flat = np.array([np.concatenate([a.ravel() for a in gradient]) for gradient in gradients])
    losses = [loss_in_numpy(there, batch) for there in moved]
    found = diagnostics.landscape(model, variables, batch, step_sizes=steps)
    expected = {"losses": losses, "gradient_distances": np.linalg.norm(flat - flat[1], axis=1)}
    assert_close(found, expected, 1e-7)
    assert found["losses"][1] == pytest.approx(losses[1], rel=1e-13)
    assert found["gradient_distances"][1] < 1e-13


@pytest.mark.parametrize(
    ("name", "slope", "flat", "steep"),
    [
        ("sigmoid", {}, [-100, -4.59, 4.59], [-4.58, 0, 4.58]),
        ("sigmoid", {"slope": 0.1}, [-2.07, 2.07, 3], [-2.06, 0, 2.06]),
        ("tanh", {}, [-30, -2.994, 2.994], [-2.993, 0, 2.993]),
        ("relu", {}, [-1e3, -2, -1e-6], [1e-6, 3, 4]),
        ("leaky_relu", {"slope": 0.011}, [-3, -4], [1, 2, 3, 4]),
        ("leaky_relu", {"slope": 0.009}, [], [-2, -1, 1, 2, 3, 4]),
    ],
)
def test_saturation_is_where_the_activation_is_flat(name, slope, flat, steep):
    values = jnp.array([flat + steep], jnp.float32)
    found = diagnostics.saturation(values, ACTIVATIONS[name], **slope)
    assert found == pytest.approx(len(flat) / values.size)


@each_mode
@each_network
@pytest.mark.usefixtures("x64")
def test_dead_units_say_the_same_of_every_example(use_batch_norm, train):
    model, variables, batch = network("relu", use_batch_norm)
    params, dead = variables["params"], [2, 3]
    for k in range(2):
        bias = params[f"BatchNorm_{k}" if use_batch_norm else f"Dense_{k}"]["bias"]
        bias[:] = 2.0
        bias[:2] = -1e3
    params["Dense_1"]["kernel"][:, -1] = 0
    if use_batch_norm:
        *_, variables["batch_stats"] = in_numpy(variables, batch.images, "relu", train=True)
        away = 1e3 * np.sign(params["BatchNorm_1"]["scale"][2])
        variables["batch_stats"]["BatchNorm_1"]["mean"][2] = away
        dead[1] += not train
    layers = diagnostics.features(model, variables, batch, train=train)
    assert layers["features_2"][0, -1] > 1  # dead, though not silent
    found = [diagnostics.dead_units(layer) for layer in layers.values()]
    assert found == pytest.approx([dead[0] / 6, dead[1] / 5])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.eye(3), 0),
        (np.outer([1e-3, 1, 50], [3, 0, -4]), 1),
        (np.outer([1, -2, 3], [1, 2, 3]), -1 / 3),
        ([[1, 0, 0], [1, 1, 0], [0, 0, 1]], np.sqrt(0.5) / 3),
        ([[3, 4, 0], [0, 0, 0], [6, 8, 0]], 1 / 3),
        (np.zeros((3, 3)), 0),
    ],
)
def test_cosine_similarity_of_given_features(values, expected):
    found = diagnostics.cosine_similarity(jnp.array(values, jnp.float32))
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize(
    ("singular", "threshold", "expected"),
    [
        ([1, 0.5, 0.011, 0.009], {}, 3),
        ([1, 0.5, 0.011, 0.009], {"threshold": 0.4}, 2),
        ([0, 0, 0, 0], {}, 0),
    ],
)
def test_effective_rank_counts_singular_values(singular, threshold, expected, scale):
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 4)))[0] for n in (9, 4))
    values = scale * left @ np.diag(singular) @ right.T
    found = diagnostics.effective_rank(jnp.array(values, jnp.float32), **threshold)
    assert found == expected
    assert jnp.issubdtype(found.dtype, jnp.integer)


def test_compiled_in_float32_on_integer_images():
    """What float64 says of the same images, op by op."""
    probes = (
        partial(diagnostics.landscape, step_sizes=(0.05, 0.0, 2.0)),
        diagnostics.features,
        diagnostics.preactivations,
        diagnostics.gradient_norms,
        diagnostics.backpropagated_norms,
    )
    measures = (
        partial(diagnostics.saturation, activation=jnp.tanh),
        diagnostics.dead_units,
        diagnostics.cosine_similarity,
        diagnostics.effective_rank,
    )
    model, variables, batch = network("tanh", dtype=np.float32)
    images = np.random.default_rng(0).integers(0, 256, (16, 2, 2), np.uint8)
    integers, floats = (batch._replace(images=a) for a in (images, images / 255))

    def look(variables, batch):
        layers = diagnostics.preactivations(model, variables, batch).values()
        of_layers = [[measure(layer) for layer in layers] for measure in measures]
        return [probe(model, variables, batch) for probe in probes], of_layers

    found = jax.jit(look)(variables, integers)
    with jax.enable_x64(True):
        variables = jax.tree.map(np.float64, variables)
        expected = look(variables, floats)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)


class Convolutional(nn.Module):
    """A user's own: nothing in it but Flax's layers and functions."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.LayerNorm()(x)
        x = nn.Conv(3, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        x = nn.Dense(5)(x.reshape(len(x), -1))
        x = nn.tanh(nn.Dropout(0.5, deterministic=True)(x))
        return nn.Dense(3)(x)


def pictures(model, shape=(6, 4, 4, 2), dtype=np.float32):
    """Variables of the model, and a batch."""
    images = np.random.default_rng(0).normal(size=shape).astype(dtype)
    batch = Batch(images, np.arange(len(images), dtype=np.int32) % 3)
    return jax.jit(partial(model.init, train=True))(jax.random.key(0), images), batch


def test_a_module_of_ones_own_is_seen_layer_by_layer():
    model = Convolutional()
    variables, batch = pictures(model)
    seen = diagnostics.preactivations(model, variables, batch)
    left = diagnostics.features(model, variables, batch)
    assert [a.shape for a in seen.values()] == [(6, 4, 4, 3), (6, 5)]
    assert [a.shape for a in left.values()] == [(6, 12), (6, 5)]
    pooled = nn.max_pool(nn.relu(seen["preactivations_1"]), (2, 2), (2, 2)).reshape(6, -1)
    np.testing.assert_array_equal(left["features_1"], pooled)
    np.testing.assert_array_equal(left["features_2"], nn.tanh(seen["preactivations_2"]))


@pytest.mark.usefixtures("x64")
def test_gradients_in_convolutions_agree_with_the_network_written_out():
    model = Convolutional()
    variables, batch = pictures(model, dtype=np.float64)
    params = variables["params"] = jax.tree.map(np.float64, variables["params"])
    x = batch.images - batch.images.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)

    def loss(kernel, shifts):
        axes = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=axes)
        y = y + shifts["Conv_0"]
        mean, var = (of(y, axis=(0, 1, 2), keepdims=True) for of in (jnp.mean, jnp.var))
        y = (y - mean) / jnp.sqrt(var + 1e-5)
        y = nn.max_pool(nn.relu(y), (2, 2), (2, 2)).reshape(6, -1)
        y = jnp.tanh(y @ params["Dense_0"]["kernel"] + shifts["Dense_0"])
        y = y @ params["Dense_1"]["kernel"] + shifts["Dense_1"]
        return -jax.nn.log_softmax(y)[np.arange(6), batch.labels].mean()

    shapes = {"Conv_0": (6, 4, 4, 3), "Dense_0": (6, 5), "Dense_1": (6, 3)}
    shifts = {name: np.zeros(shape) for name, shape in shapes.items()}
    gradients = jax.jit(jax.grad(loss, (0, 1)))
    of_kernel, of_outputs = gradients(params["Conv_0"]["kernel"], shifts)
    found = jax.jit(partial(diagnostics.gradient_norms, model))(variables, batch)
    assert list(found) == list(shapes)
    assert found["Conv_0"] == pytest.approx(np.linalg.norm(of_kernel), rel=1e-10)
    expected = {name: np.linalg.norm(of_outputs[name]) for name in shapes}
    found = jax.jit(partial(diagnostics.backpropagated_norms, model))(variables, batch)
    assert_close(found, expected, 1e-10)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (MLP((4,) * 11, 3), [f"Dense_{k}" for k in range(12)]),
        (Nested(11), [*(f"Block_{k}/Conv_0" for k in range(11)), "Dense_0"]),
    ],
)
def test_layers_come_in_the_order_of_their_calls_also_beyond_ten(model, names):
    """Of variables as JAX returns them: with sorted keys."""
    look = jax.eval_shape(partial(pictures, model))

    def order(probe):
        found = []
        jax.eval_shape(lambda variables, batch: found.extend(probe(model, variables, batch)), *look)
        return found

    assert order(diagnostics.gradient_norms) == names
    assert order(diagnostics.backpropagated_norms) == names
    assert order(diagnostics.preactivations) == [f"preactivations_{k}" for k in range(1, 12)]


class Seen(nn.Module):
    """Each hidden layer a convolution and its activation, then pooling."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.max_pool(Activation(nn.relu)(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
        x = Activation(nn.tanh)(nn.Conv(3, (3, 3))(x))
        return nn.Dense(3)(x.reshape(len(x), -1))


def test_units_of_pictures_are_their_channels():
    model = Seen()
    variables, batch = pictures(model)
    variables["params"]["Conv_0"]["bias"] = np.array([-1e3, 0, 0, 0], np.float32)
    variables["params"]["Conv_1"]["kernel"] *= np.array([[[[0, 1, 100]]]], np.float32)

    @jax.jit
    def look(variables):
        seen = list(diagnostics.preactivations(model, variables, batch).values())
        left = list(diagnostics.features(model, variables, batch).values())
        ranks = [diagnostics.effective_rank(a, threshold=0.3) for a in left]
        dead, cosines = (
            [probe(a) for a in left]
            for probe in (diagnostics.dead_units, diagnostics.cosine_similarity)
        )
        return seen, left, dead, cosines, ranks, diagnostics.saturation(seen[1], nn.tanh)

    seen, left, dead, cosines, ranks, flat = jax.tree.map(np.asarray, look(variables))
    assert [a.shape for a in left] == [(6, 4, 4, 4), (6, 2, 2, 3)]
    np.testing.assert_array_equal(left[0], np.maximum(seen[0], 0))
    assert dead == pytest.approx([1 / 4, 1 / 3])
    assert flat == pytest.approx(np.mean(np.tanh(seen[1]) ** 2 > 0.99))
    rows = [a.reshape(6, -1) for a in left]
    expected = [np.mean([a @ b for a, b in combinations(unit(x), 2)]) for x in rows]
    assert cosines == pytest.approx(expected, rel=1e-5)
    assert ranks == [np.linalg.matrix_rank(x, tol=0.3 * np.linalg.norm(x, 2)) for x in rows]


class Doubled(nn.Dense):
    """Calls what it derives from."""

    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Shared(nn.Module):
    """A layer that is called twice, by name, and one that calls what it derives from."""

    @nn.compact
    def __call__(self, x, train):
        dense = nn.Dense(4)
        return Doubled(3)(jnp.tanh(dense(inputs=jnp.tanh(dense(x)))))


@pytest.mark.usefixtures("x64")
def test_calls_of_a_layer_count_together_in_what_is_backpropagated():
    model = Shared()
    variables, batch = pictures(model, (6, 4), np.float64)
    variables["params"] = params = jax.tree.map(np.float64, variables["params"])
    dense, doubled = params["Dense_0"]["kernel"], params["Doubled_0"]["kernel"]

    def loss(shifts):
        x = jnp.tanh(batch.images @ dense + shifts[0])
        y = 2 * jnp.tanh(x @ dense + shifts[1]) @ doubled + shifts[2]
        return -jax.nn.log_softmax(y)[np.arange(6), batch.labels].mean()

    first, second, last = jax.jit(jax.grad(loss))([np.zeros((6, n)) for n in (4, 4, 3)])
    expected = {"Dense_0": np.linalg.norm([first, second]), "Doubled_0": np.linalg.norm(last)}
    assert_close(diagnostics.backpropagated_norms(model, variables, batch), expected, 1e-12)
    assert len(diagnostics.features(model, variables, batch)) == 2


class Again(nn.Module):
    """Computes its inside anew in the backward pass, from which no array may leave."""

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(nn.remat(nn.Dense)(4)(x))


def test_layers_inside_transformations_cannot_be_looked_at():
    model = Again()
    variables, batch = pictures(model, (6, 4))
    for probe in (diagnostics.features, diagnostics.backpropagated_norms):
        with pytest.raises(
            ValueError, match=r"^CheckpointDense_0 is called inside nn.scan, nn.rem"
        ):
            probe(model, variables, batch)
    kernels = diagnostics.gradient_norms(model, variables, batch)
    assert list(kernels) == ["CheckpointDense_0", "Dense_0"]


class Halved(nn.Module):
    """A normalization of a user's own, of which bnjax knows nothing."""

    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm()(x) / 2


@pytest.mark.parametrize("norm", ["batch", "layer", lambda train: Halved()])
@pytest.mark.parametrize("norm_after", [False, True])
def test_features_are_those_that_the_network_returns(norm, norm_after):
    model = MLP((4, 5), 3, norm, norm_after=norm_after)
    variables, batch = pictures(model)
    _, expected = model.apply(variables, batch.images, train=False, return_features=True)
    found = diagnostics.features(model, variables, batch)
    chex.assert_trees_all_equal(list(found.values()), expected)


def test_normalization_after_the_activation_belongs_to_what_leaves_the_layer():
    model = MLP((4, 5), 3, norm_after=True)
    variables, batch = pictures(model)
    seen = diagnostics.preactivations(model, variables, batch, train=True)
    left = diagnostics.features(model, variables, batch, train=True)
    for entering, leaving in zip(seen.values(), left.values(), strict=True):
        rows = np.maximum(np.asarray(entering, np.float64), 0)
        expected = (rows - rows.mean(axis=0)) / np.sqrt(rows.var(axis=0) + 1e-5)
        np.testing.assert_allclose(leaving, expected, rtol=1e-4, atol=1e-5)

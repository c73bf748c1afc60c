from functools import partial
from typing import Any, ClassVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import Nested
from reference import relative_error

import bnjax
from bnjax.layers import BatchNorm
from bnjax.models import MLP
from bnjax.population import (
    average_batch_moments,
    estimate,
    layer_paths,
    pool_batch_moments,
    statistics_gap,
)
from bnjax.torch_interop import from_torch, to_torch

KEY = jax.random.key(0)
EQUAL, UNEQUAL = (8, 8, 8, 8), (12, 5, 12, 3)
TOLERANCE = {np.float32: 1e-6, np.float64: 1e-13}


@pytest.fixture(params=TOLERANCE)
def dtype(request):
    with jax.enable_x64(jax.config.jax_enable_x64 or request.param == np.float64):
        yield request.param


def normal(shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def drifting(sizes, *shape, dtype=np.float64):
    """Batches of which no two have the same distribution."""
    return [normal((n, *shape), seed=k, dtype=dtype) + dtype(2 * k) for k, n in enumerate(sizes)]


def arbitrary(module, x):
    """The module's variables, none of which is what it starts or ends with."""
    rng = np.random.default_rng(7)
    shapes = jax.eval_shape(partial(module.init, train=True), KEY, x)
    draw = {"params": partial(rng.uniform, -2, 2), "batch_stats": partial(rng.uniform, 0.5, 2)}
    return {
        key: jax.tree.map(lambda a, key=key: draw[key](a.shape).astype(x.dtype), shapes[key])
        for key in draw
    }


def pooled(batches):
    everything = np.concatenate(batches)
    return {"mean": everything.mean(axis=0), "var": everything.var(axis=0)}


def averaged(batches):
    return {
        "mean": np.mean([x.mean(axis=0) for x in batches], axis=0),
        "var": np.mean([x.var(axis=0, ddof=1) for x in batches], axis=0),
    }


def in_numpy(params, batches, combine, layer_by_layer):
    """The statistics of an MLP in float64: layers normalize with them, or with the batch's own."""
    params = jax.tree.map(np.float64, params)
    stats = {}
    for k in range(len(params) // 2):
        dense, norm = params[f"Dense_{k}"], params[f"BatchNorm_{k}"]
        batches = [np.float64(x) @ dense["kernel"] + dense["bias"] for x in batches]
        combined = stats[f"BatchNorm_{k}"] = combine(batches)
        for i, x in enumerate(batches):
            used = combined if layer_by_layer else pooled([x])
            normalized = (x - used["mean"]) / np.sqrt(used["var"] + 1e-5)
            batches[i] = np.maximum(norm["scale"] * normalized + norm["bias"], 0)
    return stats


def assert_close(stats, expected, tolerance):
    jax.tree.map(lambda a, b: chex.assert_equal_shape([a, b]), stats, expected)
    errors = jax.tree.map(relative_error, stats, expected)
    assert max(jax.tree.leaves(errors)) < tolerance, errors


@pytest.mark.parametrize("offset", [0.5, 1e4, -1e5])
@pytest.mark.parametrize(
    ("cuts", "order"), [([], 1), ([40, 52, 68], 1), (range(3, 70, 3), 1), (range(3, 70, 3), -1)]
)
def test_the_cut_into_batches_does_not_matter(dtype, offset, cuts, order):
    x = (normal((71, 4)) + offset).astype(dtype)
    model = MLP((4, 5), 3)
    variables = arbitrary(model, x)
    variables["params"]["Dense_0"] = {"kernel": np.eye(4, dtype=dtype), "bias": np.zeros(4, dtype)}
    found = estimate(model, variables, np.split(x, cuts)[::order])["batch_stats"]["BatchNorm_0"]
    tolerance = 1e-11 if dtype == np.float64 else 1e-6
    assert_close(found, pooled([x.astype(np.longdouble)]), tolerance)


@pytest.mark.parametrize("layer_by_layer", [False, True])
@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL])
@pytest.mark.parametrize(
    ("combine", "expected"), [(pool_batch_moments, pooled), (average_batch_moments, averaged)]
)
def test_all_layers_agree_with_numpy(dtype, combine, expected, sizes, layer_by_layer):
    model, batches = MLP((6, 5, 4), 3), drifting(sizes, 4, dtype=dtype)
    variables = arbitrary(model, batches[0])
    settings = {"layer_by_layer": layer_by_layer, "combine": combine}
    found = estimate(model, variables, batches, **settings)
    expected = in_numpy(variables["params"], batches, expected, layer_by_layer)
    assert_close(found["batch_stats"], expected, 5 * TOLERANCE[dtype])
    assert found["params"] is variables["params"]


class Block(nn.Module):
    norm: Any
    axis: int

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(3, (2, 2))(x)
        return nn.relu(self.norm(use_running_average=not train, axis=self.axis)(x))


class Convolutional(nn.Module):
    norm: Any = bnjax.BatchNorm
    axis: int = -1

    @nn.compact
    def __call__(self, x, *, train):
        x = Block(self.norm, self.axis)(x, train=train)
        return Block(self.norm, self.axis)(x, train=train)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "module",
    [
        MLP((6, 5), 3),
        Convolutional(axis=1),
        pytest.param(Convolutional(), marks=pytest.mark.slow),
        pytest.param(Convolutional(nn.BatchNorm), marks=pytest.mark.slow),
    ],
)
def test_layer_by_layer_is_training_mode_on_everything_as_one_batch(module):
    batches = drifting(UNEQUAL, 5, 4, 2)
    everything = np.concatenate(batches)
    variables = arbitrary(module, batches[0])
    found = estimate(module, variables, batches, layer_by_layer=True)
    y = module.apply(found, everything, train=False)
    expected, _ = module.apply(variables, everything, train=True, mutable=["batch_stats"])
    assert relative_error(y, expected) < 1e-13


class Masked(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x, *, train):
        mask = ~jnp.isnan(x).any(axis=-1, keepdims=True)
        return self.norm(use_running_average=not train)(x, mask=mask)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("layer_by_layer", [False, True])
@pytest.mark.parametrize("norm", [bnjax.BatchNorm, nn.BatchNorm])
def test_masked_samples_count_for_nothing(norm, layer_by_layer):
    module, batches = Masked(norm), drifting(UNEQUAL, 6, 3)
    for k, x in enumerate(batches):
        x[:, k + 1 :] = np.nan
    variables = arbitrary(module, batches[0])
    valid = [x[:, : k + 1].reshape(-1, 3) for k, x in enumerate(batches)]
    for combine, expected in (pool_batch_moments, pooled), (average_batch_moments, averaged):
        settings = {"layer_by_layer": layer_by_layer, "combine": combine}
        found = estimate(module, variables, batches, **settings)
        assert_close(found["batch_stats"]["BatchNorm_0"], expected(valid), 1e-13)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL])
def test_update_bn_of_torch(sizes):
    """It is algorithm 2: each batch weighs the same, and the variance between them is missing."""
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(
        torch.nn.Linear(4, 6),
        torch.nn.BatchNorm1d(6),
        torch.nn.ReLU(),
        torch.nn.Linear(6, 5),
        torch.nn.BatchNorm1d(5),
        torch.nn.ReLU(),
        torch.nn.Linear(5, 3),
    ).double()
    model, batches = MLP((6, 5), 3), drifting(sizes, 4)
    variables = arbitrary(model, batches[0])
    module.load_state_dict({k: torch.tensor(v) for k, v in to_torch(variables).items()})
    torch.optim.swa_utils.update_bn([torch.tensor(x) for x in batches], module)
    theirs = from_torch(module.state_dict(), model)["batch_stats"]
    assert [layer.pop("count") for layer in theirs.values()] == [len(sizes)] * 2
    ours = estimate(model, variables, batches, combine=average_batch_moments)
    assert_close(ours["batch_stats"], theirs, 1e-13)

    dense = variables["params"]["Dense_0"]
    entering = [x @ dense["kernel"] + dense["bias"] for x in batches]
    ours = estimate(model, variables, batches)["batch_stats"]["BatchNorm_0"]
    theirs, population = theirs["BatchNorm_0"], pooled(entering)
    assert_close(ours, population, 1e-13)
    assert_close(theirs, averaged(entering), 1e-13)
    assert relative_error(theirs["var"], population["var"]) > 0.2
    assert (relative_error(theirs["mean"], population["mean"]) > 0.2) == (sizes == UNEQUAL)


def test_dropout_does_not_matter():
    x = normal((12, 4), dtype=np.float32)
    models = [MLP((6, 5), 3, dropout_rate=rate) for rate in (0.0, 0.5)]
    variables = arbitrary(models[0], x)
    chex.assert_trees_all_equal(*(estimate(model, variables, [x]) for model in models))


def test_integer_images_are_scaled():
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 3), np.uint8)
    model, x = MLP((6,), 3), images.astype(np.float32) / 255
    variables = arbitrary(model, x)
    found = (estimate(model, variables, np.split(a, [15])) for a in (images, x))
    chex.assert_trees_all_close(*found, rtol=1e-6)


@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_the_number_of_batches_seen_stays(layer_by_layer):
    model, x = MLP((6, 5), 3), normal((12, 4), dtype=np.float32)
    variables = arbitrary(model, x)
    for k, stats in enumerate(variables["batch_stats"].values()):
        stats["count"] = np.array(7 + k)
    found = estimate(model, variables, [x], layer_by_layer=layer_by_layer)
    assert [int(stats["count"]) for stats in found["batch_stats"].values()] == [7, 8]


@pytest.mark.parametrize("layer_by_layer", [False, True])
@pytest.mark.parametrize(
    ("use_batch_norm", "sizes", "message"),
    [
        (True, [], "found no batch$"),
        (False, [2], "found no batch normalization"),
        (True, [2, 1], r"N = 1 in x of shape \(1, 6\)"),
    ],
)
def test_no_statistics_are_refused(layer_by_layer, use_batch_norm, sizes, message):
    model, batches = (
        MLP((6,), 3, "batch" if use_batch_norm else None),
        [normal((n, 4), dtype=np.float32) for n in sizes],
    )
    variables = model.init(KEY, jnp.ones((2, 4)), train=True)
    with pytest.raises(ValueError, match=message):
        estimate(model, variables, batches, layer_by_layer=layer_by_layer)


def test_batches_readable_once_serve_all_layers_at_once_only():
    model, batches = MLP((6, 5), 3), drifting(EQUAL, 4, dtype=np.float32)
    variables = arbitrary(model, batches[0])
    found = estimate(model, variables, (x for x in batches))
    chex.assert_trees_all_equal(found, estimate(model, variables, batches))
    with pytest.raises(ValueError, match=r"found an iterator, .*: pass a list"):
        estimate(model, variables, iter(batches), layer_by_layer=True)


def test_gap_in_units_of_the_population():
    mean, std = normal((2, 3), dtype=np.float32) + 2
    still = {
        "BatchNorm_0": {"mean": mean, "var": std**2 - 1e-3, "count": 5},
        "MeanOnlyBatchNorm_0": {"mean": mean},
    }
    moved = {"mean": mean + [3, 0, -3] * std, "var": (std * [1, 1, 4]) ** 2 - 1e-3}
    population = {"batch_stats": {"Block_0": still, "Block_1": still, **still}}
    running = {"batch_stats": population["batch_stats"] | {"Block_1": {"BatchNorm_0": moved}}}
    found = statistics_gap(running, population, epsilon=1e-3)
    assert found.keys() == {"Block_0/BatchNorm_0", "Block_1/BatchNorm_0", "BatchNorm_0"}
    np.testing.assert_allclose(found.pop("Block_1/BatchNorm_0"), np.sqrt([6, 3]), rtol=1e-6)
    assert list(found.values()) == [(0.0, 0.0)] * 2


class Layer(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x, _):
        return bnjax.BatchNorm(not self.train)(nn.Dense(x.shape[-1])(x)), None


class Scanned(nn.Module):
    """Three layers whose variables are stacked."""

    @nn.compact
    def __call__(self, x, *, train):
        axes = {"params": 0, "batch_stats": 0}
        layers = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=3)
        return layers(train)(x, None)[0]


def test_layers_under_scan_have_stacked_statistics():
    batches = drifting(UNEQUAL, 4, dtype=np.float32)
    model = Scanned()
    variables = model.init(KEY, batches[0], train=True)
    (layers,) = estimate(model, variables, batches)["batch_stats"].values()
    (params,) = variables["params"].values()
    x, mean = [b.astype(np.float64) for b in batches], []
    for k in range(3):
        dense = {name: np.float64(value[k]) for name, value in params["Dense_0"].items()}
        x = [b @ dense["kernel"] + dense["bias"] for b in x]
        mean.append(np.concatenate(x).mean(axis=0))
        x = [(b - b.mean(axis=0)) / np.sqrt(b.var(axis=0) + 1e-5) for b in x]
    assert relative_error(layers["BatchNorm_0"]["mean"], np.stack(mean)) < 1e-5


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        norm = bnjax.BatchNorm(use_running_average=not train)
        return norm(x=x[:, :2]) + norm(x[:, 2:])


def test_layers_come_in_the_order_of_their_calls_also_beyond_ten():
    module, images = Nested(11), np.ones((2, 4, 4), np.float32)
    variables = jax.tree.map(lambda a: a, module.init(KEY, images, train=True))
    paths = [(f"Block_{k}", "BatchNorm_0") for k in range(11)]
    assert layer_paths(module, variables, images) == paths
    assert layer_paths(Twice(), Twice().init(KEY, images[0], train=True), images[0]) == [
        ("BatchNorm_0",)
    ]


def test_a_layer_that_is_called_twice_pools_its_calls():
    batches = drifting(UNEQUAL, 4, dtype=np.float32)
    variables = Twice().init(KEY, batches[0], train=True)
    found = estimate(Twice(), variables, batches)["batch_stats"]["BatchNorm_0"]
    rows = np.concatenate(batches).astype(np.float64).reshape(-1, 2)
    assert_close(found, {"mean": rows.mean(axis=0), "var": rows.var(axis=0)}, 1e-6)


def test_a_mask_that_leaves_one_sample_is_refused():
    x = normal((5, 3), dtype=np.float32)
    model = Masked(bnjax.BatchNorm)
    mask = np.array([0, 0, 1, 0, 0], bool)
    variables = model.init(KEY, x, train=True)
    with pytest.raises(ValueError, match="fewer than 2 valid samples"):
        estimate(model, variables, [np.where(mask[:, None], x, np.nan)])


def test_pairs_of_images_and_labels_are_taken():
    batches = drifting(EQUAL, 4, dtype=np.float32)
    model = MLP((3,), 2)
    variables = arbitrary(model, batches[0])
    pairs = [(x, np.zeros(len(x))) for x in batches]
    chex.assert_trees_all_equal(
        estimate(model, variables, pairs), estimate(model, variables, batches)
    )


def test_gap_of_other_networks_is_refused():
    variables = [
        arbitrary(MLP(sizes, 2), normal((2, 4), dtype=np.float32)) for sizes in ((3,), (3, 3))
    ]
    with pytest.raises(ValueError, match="differ in their layers: BatchNorm_1"):
        statistics_gap(*variables)


class Counted(nn.Module):
    """Notes each time that it is traced; `table` may be what has no hash."""

    traced: ClassVar[list[tuple[int, ...]]] = []
    table: Any = None

    @nn.compact
    def __call__(self, x, train):
        self.traced.append(x.shape)
        x = BatchNorm(use_running_average=not train)(nn.Dense(3)(x))
        return x if self.table is None else x + self.table


def test_a_module_is_compiled_once_for_each_shape():
    batches = drifting(UNEQUAL, 4, dtype=np.float32)
    module = Counted()
    variables = module.init(KEY, batches[0], train=True)
    expected = estimate(module, variables, batches)
    Counted.traced.clear()
    for _ in range(3):
        chex.assert_trees_all_equal(estimate(Counted(), variables, batches), expected)
    assert Counted.traced == []
    estimate(module, variables, [normal((30, 4), dtype=np.float32)])
    assert len(Counted.traced) == 1


def test_a_module_without_a_hash_is_measured_all_the_same():
    batches = drifting(EQUAL, 4, dtype=np.float32)
    module = Counted(table=np.zeros((1, 3), np.float32))
    variables = module.init(KEY, batches[0], train=True)
    with pytest.raises(TypeError):
        hash(module)
    found = estimate(module, variables, batches)
    chex.assert_trees_all_equal(found, estimate(Counted(), variables, batches))


class Tensor:
    """As PyTorch's, whose dtypes NumPy does not understand."""

    dtype, shape = object(), (4, 4)


@pytest.mark.parametrize("layer_by_layer", [False, True])
@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ({"image": np.ones((4, 4), np.float32)}, "images are a dict: expected an array of uint8"),
        ("batch", "images are a str: expected an array"),
        (Tensor(), "images are a Tensor: expected an array"),
        ((), "images are a tuple: expected an array"),
        ([[0.5, 0.25], [0.0, 1.0]], "images are a list: expected an array"),
        (np.ones((4, 4), np.int64), r"images are int64\[4, 4\]: .* uint8 in 0..255"),
        ((np.ones((4, 4), bool), np.ones(4)), r"images are bool\[4, 4\]: .* uint8 in 0..255"),
    ],
)
def test_batches_that_are_no_images_are_refused(batch, told, layer_by_layer):
    model = MLP((6,), 3)
    variables = model.init(KEY, jnp.ones((2, 4)), train=True)
    with pytest.raises(ValueError, match=told):
        estimate(model, variables, [batch], layer_by_layer=layer_by_layer)

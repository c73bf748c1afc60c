import random
import re
import subprocess
import sys
from collections import OrderedDict
from functools import cache, partial
from itertools import pairwise, product

import chex
import flax.core
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import norm_of

from bnjax import BatchNorm
from bnjax.data import load
from bnjax.models import MLP
from bnjax.torch_interop import from_torch, to_torch
from bnjax.training import Batch, TrainState, train_step

MODEL = MLP((5, 4), 3)
DENSE_KEYS = ("weight", "bias")
NORM_KEYS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
KEYS = [
    f"{layer}.{key}"
    for layer, keys in enumerate([DENSE_KEYS, NORM_KEYS, ()] * 2 + [DENSE_KEYS])
    for key in keys
]


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return torch


def mlp(torch, dtype="float64", sizes=(6, 5, 4, 3), use_batch_norm=True, bias=True, affine=True):
    """The network in PyTorch, with normalization as after three batches of training."""
    *hidden, outputs = pairwise(sizes)
    layers = []
    for fan_in, size in hidden:
        norm = torch.nn.BatchNorm1d(size, affine=affine)
        for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
        norm.num_batches_tracked.fill_(3)
        layers += [torch.nn.Linear(fan_in, size, bias), *[norm][:use_batch_norm], torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(*outputs, bias)).to(getattr(torch, dtype))


def normal(shape, dtype="float64"):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def evaluate(torch, module, x):
    return module.eval()(torch.tensor(x)).detach().numpy()


def init(model):
    return model.init(jax.random.key(0), normal((2, 6), "float32"), train=True)


@cache
def fresh_state_dict():
    return to_torch(init(MODEL))


def shuffled(mapping, seed=0):
    return dict(random.Random(seed).sample(list(mapping.items()), len(mapping)))


def numbered(names, shapes=((4, 4),) * 7):
    """Linear layers in a random order; each holds its own number."""
    weights = {}
    for k, (name, shape) in enumerate(zip(names, shapes, strict=False)):
        weights[f"{name}.weight"] = np.full(shape, k, np.float32)
        weights[f"{name}.bias"] = np.full(shape[0], k, np.float32)
    return shuffled(weights)


def numbers(variables):
    params = variables["params"]
    found = [params[f"Dense_{k}"] for k in range(len(params))]
    assert all(np.ptp(np.append(layer["bias"], layer["kernel"])) == 0 for layer in found)
    return [int(layer["bias"][0]) for layer in found]


def plain(sizes, num_classes):
    return MLP(sizes, num_classes, norm=None)


def test_torch_is_not_imported():
    check = "import sys, bnjax.torch_interop; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-14)])
@pytest.mark.parametrize("use_batch_norm", [True, False])
def test_there_and_back(torch, use_batch_norm, dtype, tolerance):
    module, other = (mlp(torch, dtype, use_batch_norm=use_batch_norm) for _ in range(2))
    model = MODEL.clone(norm="batch" if use_batch_norm else None)
    variables = from_torch(module.state_dict(), model)
    x = normal((7, 6), dtype)
    y = model.apply(variables, x, train=False)
    assert y.dtype == dtype
    np.testing.assert_allclose(y, evaluate(torch, module, x), rtol=tolerance, atol=tolerance)

    back = {key: torch.tensor(value) for key, value in to_torch(variables).items()}
    for key, value in module.state_dict().items():
        assert back[key].dtype == value.dtype
        assert torch.equal(back[key], value)
    other.load_state_dict(back, strict=True)
    np.testing.assert_array_equal(evaluate(torch, other, x), evaluate(torch, module, x))
    chex.assert_trees_all_equal(from_torch(to_torch(variables), model), variables)


@pytest.mark.usefixtures("x64")
def test_layers_are_matched_in_their_order_whatever_their_names(torch):
    *layers, head = mlp(torch)
    encoder = torch.nn.Sequential(OrderedDict(zip("zyxwvu", layers, strict=True)))
    between = {"flatten": torch.nn.Flatten(), "encoder": encoder, "drop": torch.nn.Dropout()}
    module = torch.nn.Sequential(OrderedDict(**between, head=head))
    variables = from_torch(module.state_dict(), MODEL)
    x = normal((7, 2, 3))
    y = MODEL.apply(variables, x, train=False)
    np.testing.assert_allclose(y, evaluate(torch, module, x), rtol=1e-14, atol=1e-14)
    for ours, theirs in zip(
        to_torch(variables).values(), module.state_dict().values(), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_arrays_are_copies(torch):
    module = mlp(torch)
    expected = {key: value.clone().numpy() for key, value in module.state_dict().items()}
    variables = from_torch(module.state_dict(), MODEL)
    for value in module.state_dict().values():
        value.fill_(7)
    found = to_torch(variables)
    for leaf in jax.tree.leaves(variables):
        leaf[...] = 7
    chex.assert_trees_all_equal(found, expected)


@pytest.mark.usefixtures("x64")
def test_the_number_of_batches_is_counted_on(torch):
    module, x = mlp(torch), normal((8, 6))
    variables = from_torch(module.state_dict(), MODEL)
    module(torch.tensor(x))
    _, updates = MODEL.apply(variables, x, train=True, mutable=["batch_stats"])
    found, expected = to_torch({**variables, **updates}), module.state_dict()
    assert found["1.num_batches_tracked"] == found["4.num_batches_tracked"] == 4
    for key in KEYS:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-14, atol=1e-14)


def test_without_a_count_no_batches_are_tracked():
    found = fresh_state_dict()
    assert list(found) == KEYS
    for layer in (1, 4):
        count = found[f"{layer}.num_batches_tracked"]
        assert (count, count.shape, count.dtype) == (0, (), np.int64)


OPTIONAL = ("0.bias", "1.num_batches_tracked", "3.bias", "4.num_batches_tracked", "6.bias")
SURPLUS = {"8.weight": np.ones((3, 3)), "8.bias": np.ones(3)}
TRANSPOSED = {"3.weight": np.ones((5, 4))}


@pytest.mark.parametrize(
    ("removed", "added", "message"),
    [
        *(([key], {}, f"missing: {key}") for key in KEYS if key not in OPTIONAL),
        (KEYS, {}, f"missing: {', '.join(key for key in KEYS if 'num_batches' not in key)}"),
        ([], SURPLUS, "surplus: 8.weight, 8.bias"),
        ([], TRANSPOSED, "of wrong shape: 3.weight [5, 4] (expected [4, 5])"),
        ([], {"0.weight": np.ones(5)}, "of wrong shape: 0.weight [5] (expected [5, any])"),
        (
            ["0.bias", "6.weight"],
            SURPLUS | TRANSPOSED,
            "missing: 6.weight; surplus: 8.weight, 8.bias; "
            "of wrong shape: 3.weight [5, 4] (expected [4, 5])",
        ),
    ],
)
def test_all_that_does_not_fit_is_named_at_once(removed, added, message):
    given = {key: value for key, value in fresh_state_dict().items() if key not in removed}
    message = f"the state_dict does not fit the model: {message}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_torch(given | added, MODEL)


def test_variables_of_another_network_are_refused():
    variables = from_torch(fresh_state_dict(), MODEL)
    del variables["batch_stats"]["BatchNorm_1"]["var"]
    with pytest.raises(ValueError, match="missing or surplus: batch_stats/BatchNorm_1/var"):
        to_torch(variables)


@pytest.fixture(params=["digits", "mnist"])
def examples(request):
    if request.param == "digits":
        return load("digits")
    return load("mnist", request.getfixturevalue("mnist_directory"))


def train_side_by_side(torch, examples, dtype, ours, theirs):
    """100 steps from the same weights: our variables, PyTorch's module, the losses of both."""
    model, module = MLP((32, 32), 10), mlp(torch, dtype, (784, 32, 32, 10))
    variables, theirs = from_torch(module.state_dict(), model), theirs(module.parameters())
    state = TrainState.create(apply_fn=model.apply, tx=ours, **variables)
    losses = []
    for k in range(100):
        rows = 100 * (k % (len(examples.train_labels) // 100)) + np.arange(100)
        images = examples.train_images[rows].reshape(100, 784).astype(dtype) / 255
        labels = examples.train_labels[rows]
        state, metrics = train_step(state, Batch(images, labels))
        theirs.zero_grad()
        logits = module(torch.tensor(images))
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels).long())
        loss.backward()
        theirs.step()
        losses.append((metrics.loss / metrics.examples, loss.item()))
    return state.variables, module, np.transpose(losses)


@pytest.mark.usefixtures("x64")
def test_adam_in_float64_takes_the_steps_of_torch(torch, examples):
    """The gradient of a bias before normalization is rounding error, here near 1e-17, and Adam
    divides it by its epsilon of 1e-8: these biases, and means that contain them, differ most, by
    1e-10. Losses do not see them."""
    variables, module, losses = train_side_by_side(
        torch, examples, "float64", optax.adam(1e-3), lambda p: torch.optim.Adam(p, lr=1e-3)
    )
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-12)
    found, expected = to_torch(variables), module.state_dict()
    assert found["1.num_batches_tracked"] == expected["1.num_batches_tracked"] == 103
    for key in KEYS:
        np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=1e-9, err_msg=key)


def test_sgd_in_float32_stays_with_torch(torch, examples):
    variables, module, losses = train_side_by_side(
        torch, examples, "float32", optax.sgd(0.1), lambda p: torch.optim.SGD(p, lr=0.1)
    )
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)
    x = examples.test_images[:300].reshape(300, 784).astype(np.float32) / 255
    logits = MLP((32, 32), 10).apply(variables, x, train=False)
    np.testing.assert_allclose(logits, evaluate(torch, module, x), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"batch_stats": {}}, "batch_stats/BatchNorm_0/mean"),
        ({"params": {}}, "batch_stats/BatchNorm_1/mean"),
        ({"params": {"Conv_0": {"kernel": np.zeros((2, 2))}}}, "params/Conv_0/kernel"),
    ],
)
def test_variables_that_are_not_whole_are_refused(change, told):
    variables = from_torch(fresh_state_dict(), MODEL)
    with pytest.raises(ValueError, match=told):
        to_torch(variables | change)
    with pytest.raises(ValueError, match="there is no Dense_0"):
        to_torch({"params": {}})


@pytest.mark.parametrize(
    "names",
    [
        [f"{2 * k}" for k in range(6)],
        [f"net.{3 * k}" for k in range(6)],
        [f"fc{k}" for k in range(7, 13)],
        [f"layers.{k}.fc" for k in range(7, 13)],
        ["0.fc1", "0.fc2", "2.fc1", "10.fc1", "10.fc9", "10.fc10"],
        ["net.2.0.fc", "net.2.1.out", "net.2.10.in", "net.10.0.b", "net.10.1.a", "net.11"],
        ["1_in", "2_hidden", "3_hidden", "4_back", "5_back", "6_out"],
        ["stage1.block1.fc2", "stage1.block2.fc1", "stage2.x", "stage3.a", "stage4.z", "stage5"],
    ],
)
@pytest.mark.parametrize("order", [dict, lambda one: dict(sorted(one.items())), flax.core.freeze])
def test_all_numbers_in_names_tell_the_order(names, order):
    found = from_torch(order(numbered(names)), plain((4,) * 5, 4))
    assert numbers(found) == list(range(6))


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        (("fc1", "fc2", "fc3", "out"), (4, 4, 4, 4, 2)),
        (("stem", "fc1", "fc2", "out"), (6, 4, 4, 4, 2)),
        (("encoder.0", "encoder.2", "decoder.0", "decoder.2"), (8, 4, 2, 4, 8)),
        (("z", "y", "x", "w", "v", "u"), (9, 8, 7, 6, 5, 4, 3)),
        (("stage1.up", "stage1.down", "stage2.up", "stage2.down"), (2, 4, 2, 4, 2)),
        (("x", "a.0", "a.1", "a.2", "out"), (4, 4, 3, 4, 4, 2)),
    ],
)
def test_shapes_tell_what_the_names_do_not(names, sizes):
    shapes = [(size, fan_in) for fan_in, size in pairwise(sizes)]
    found = from_torch(numbered(names, shapes), plain(sizes[1:-1], sizes[-1]))
    assert numbers(found) == list(range(len(names)))


def no_order(found, expected):
    return "^" + re.escape(
        "names, kinds and shapes of the layers do not tell a single order that fits the model: "
        f"found {found}, expected, in the order of the numbers in their names, {expected}: rename "
        "them with numbers, as in fc1, fc2, or change the model"
    )


@pytest.mark.parametrize(
    ("names", "undecided"),
    [
        (("hidden", "output"), "hidden, output"),
        (("fc", "fc1"), "fc1, fc"),
        (("fc1", "fc2", "out"), "fc1, fc2, out"),
        (("n1.in", "n1.out", "n2"), "n1.in, n1.out"),
        (("a.0", "a.2", "b.0", "b.2"), "a.0, a.2, b.0, b.2"),
        (("n0", "n1.a", "n1.b", "n2.3", "n2.10"), "n1.a, n1.b"),
    ],
)
def test_an_order_that_is_not_known_is_refused(names, undecided):
    undecided = undecided.split(", ")
    found = ", ".join(f"{name}.weight [4, 4]" for name in undecided)
    first = "weight [4, any]" if names[0] in undecided else "weight [4, 4]"
    expected = ", ".join([first] + ["weight [4, 4]"] * (len(undecided) - 1))
    with pytest.raises(ValueError, match=no_order(found, expected)):
        from_torch(numbered(names), plain((4,) * (len(names) - 1), 4))


@pytest.mark.parametrize(
    ("outputs", "told"),
    [
        (4, r"model: found aa\.weight \[4, 4\], ab\.weight"),
        (3, r"model: found .*hd\.weight \[3, 4\]"),
    ],
)
def test_sixty_layers_without_numbers_are_refused_at_once(outputs, told):
    names = ["".join(letters) for letters in product("abcdefgh", repeat=2)][:60]
    shapes = [(4, 4)] * 59 + [(outputs, 4)]
    with pytest.raises(ValueError, match=told):
        from_torch(numbered(names, shapes), plain((4,) * 59, 4))


ARRANGEMENTS = {
    "attributes": lambda nn, linears, norms, head: nn.ModuleDict(
        {
            **{f"fc{k}": linear for k, linear in enumerate(linears, 1)},
            **{f"bn{k}": norm for k, norm in enumerate(norms, 1)},
            "out": head,
        }
    ),
    "lists": lambda nn, linears, norms, head: nn.ModuleDict(
        {"norms": nn.ModuleList(norms), "linears": nn.ModuleList([*linears, head])}
    ),
    "blocks": lambda nn, linears, norms, head: nn.ModuleDict(
        {
            "head": nn.Sequential(nn.Dropout(), head),
            "body": nn.ModuleList(
                nn.Sequential(linear, norm, nn.ReLU())
                for linear, norm in zip(linears, norms, strict=True)
            ),
        }
    ),
    "stages": lambda nn, linears, norms, head: nn.DataParallel(
        nn.Sequential(
            *(
                nn.ModuleDict(
                    {
                        "b": nn.ModuleList(linears[k : k + 3]),
                        "a": nn.ModuleDict({f"{j}": n for j, n in enumerate(norms[k : k + 3])}),
                    }
                )
                for k in range(0, 12, 3)
            ),
            head,
        )
    ),
    "numbered": lambda nn, linears, norms, head: nn.ModuleDict(
        {f"{7 * k}": each for k, each in enumerate(interleaved(linears, norms))} | {"1000": head}
    ),
}


def interleaved(*lists):
    return [each for group in zip(*lists, strict=True) for each in group]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("arrangement", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def test_networks_of_many_builds_compute_the_same(torch, arrangement):
    module = mlp(torch, sizes=(6, *[4] * 12, 3))
    *hidden, head = module
    state_dict = arrangement(torch.nn, hidden[::3], hidden[1::3], head).state_dict()
    x, model = normal((7, 6)), MLP((4,) * 12, 3)
    for seed in range(3):
        variables = from_torch(shuffled(state_dict, seed), model)
        y = model.apply(variables, x, train=False)
        np.testing.assert_allclose(y, evaluate(torch, module, x), rtol=1e-14, atol=1e-14)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("use_batch_norm", [True, False])
@pytest.mark.parametrize(("bias", "affine"), [(False, True), (True, False), (False, False)])
def test_what_pytorch_leaves_out_is_zero_or_one(torch, use_batch_norm, bias, affine, dtype):
    module = mlp(torch, dtype, use_batch_norm=use_batch_norm, bias=bias, affine=affine)
    model = MODEL.clone(norm="batch" if use_batch_norm else None)
    variables = from_torch(shuffled(module.state_dict()), model)
    chex.assert_trees_all_equal_shapes(variables["params"], init(model)["params"])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables["params"])} == {dtype}
    x, tolerance = normal((7, 6), dtype), {"float32": 1e-6, "float64": 1e-14}[dtype]
    y = model.apply(variables, x, train=False)
    np.testing.assert_allclose(y, evaluate(torch, module, x), rtol=tolerance, atol=tolerance)
    whole = {key: torch.tensor(value) for key, value in to_torch(variables).items()}
    other = mlp(torch, dtype, use_batch_norm=use_batch_norm)
    other.load_state_dict(whole, strict=True)
    np.testing.assert_array_equal(evaluate(torch, other, x), evaluate(torch, module, x))


def test_what_is_left_out_has_the_dtype_of_what_is_there():
    dtypes = {"0.weight": jnp.bfloat16, "1.running_mean": np.float16}
    given = {key: value.astype(dtypes.get(key, "f8")) for key, value in fresh_state_dict().items()}
    left_out = ("0.bias", "1.weight", "1.bias")
    found = from_torch({key: given[key] for key in given if key not in left_out}, MODEL)["params"]
    for array, value, dtype in (
        (found["Dense_0"]["bias"], 0, jnp.bfloat16),
        (found["BatchNorm_0"]["scale"], 1, np.float16),
        (found["BatchNorm_0"]["bias"], 0, np.float16),
    ):
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, np.full(5, value, dtype))


def test_without_numbers_of_batches_there_is_no_count():
    given = {k: v for k, v in fresh_state_dict().items() if "num_batches_tracked" not in k}
    variables = from_torch(given, MODEL)
    chex.assert_trees_all_equal(variables, jax.tree.map(np.asarray, init(MODEL)))
    given["4.num_batches_tracked"] = np.array(7)
    stats = from_torch(given, MODEL)["batch_stats"]
    assert ["count" in stats[f"BatchNorm_{k}"] for k in range(2)] == [False, True]


@pytest.mark.parametrize("use_batch_norm", [True, False])
def test_an_averaged_model_has_one_key_too_many(torch, use_batch_norm):
    module = mlp(torch, use_batch_norm=use_batch_norm)
    averaged = torch.optim.swa_utils.AveragedModel(module).state_dict()
    model = MODEL.clone(norm="batch" if use_batch_norm else None)
    with pytest.raises(
        ValueError, match=r"^the state_dict does not fit the model: surplus: n_averaged$"
    ):
        from_torch(averaged, model)
    del averaged["n_averaged"]
    expected = from_torch(module.state_dict(), model)
    chex.assert_trees_all_equal(from_torch(averaged, model), expected)


FC = OrderedDict(zip(("0", "1", "3", "4", "6"), ("fc1", "bn1", "fc2", "bn2", "out"), strict=True))


def renamed(names):
    given = fresh_state_dict()
    return {f"{names[key[0]]}{key[1:]}": value for key, value in given.items() if key[0] in names}


@pytest.mark.parametrize(
    ("given", "added", "message"),
    [
        (FC, {"step": np.array(1)}, "surplus: step"),
        (FC, {"criterion.weight": np.ones(3)}, "surplus: criterion.weight"),
        (FC, {"aux.weight": np.ones((7, 5)), "ema.decay": 0.9}, "surplus: ema.decay, aux.weight"),
        ({k: f"net.{k}" for k in "01346"}, {"net.2.weight": np.ones(1)}, "surplus: net.2.weight"),
        ({k: f"net.{k}" for k in "0146"}, {}, "missing: net.3.weight, net.3.bias"),
        (FC, {"out.running_mean": np.ones(3)}, "surplus: out.running_mean"),
        (FC, {"bn2.bias": np.ones(3)}, "of wrong shape: bn2.bias [3] (expected [4])"),
        (FC, {"bn2.running_median": np.ones(4)}, "surplus: bn2.running_median"),
    ],
)
def test_what_does_not_fit_is_named_alone(given, added, message):
    message = f"the state_dict does not fit the model: {message}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_torch(renamed(given) | added, MODEL)


@pytest.mark.parametrize(
    ("given", "added", "found", "expected"),
    [
        (FC, {"bn2.weight": np.ones(3)}, "bn2.weight [3]", "weight [4]"),
        (FC, {"fc2.weight": np.ones((4, 6))}, "fc2.weight [4, 6]", "weight [4, 5]"),
        (
            FC | {"3": "fc1", "0": "fc2"},
            {},
            "bn1.weight [5], fc1.weight [4, 5], fc2.weight [5, 6]",
            "weight [5, any], weight [5], weight [4, 5]",
        ),
        (
            {"0": "body.1", "1": "body.0", "3": "body.3", "4": "body.2", "6": "head"},
            {},
            "body.0.weight [5], body.1.weight [5, 6], body.2.weight [4], body.3.weight [4, 5]",
            "weight [5, any], weight [5], weight [4, 5], weight [4]",
        ),
    ],
)
def test_layers_that_no_order_fits_are_named(given, added, found, expected):
    with pytest.raises(ValueError, match=no_order(found, expected)):
        from_torch(renamed(given) | added, MODEL)


def test_normalization_before_linear_layers_is_refused(torch):
    nn = torch.nn
    module = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"missing: 1\.running_mean.* surplus: 0\.running_mean"):
        from_torch(module.state_dict(), MLP((4,), 4))


@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("layer", [BatchNorm, flax.linen.BatchNorm])
def test_normalization_has_the_parameters_that_the_model_has(layer, use_scale, use_bias):
    model = MODEL.clone(norm=norm_of(partial(layer, use_scale=use_scale, use_bias=use_bias)))
    plain = {
        k: v for k, v in fresh_state_dict().items() if k[:3] not in ("1.w", "1.b", "4.w", "4.b")
    }
    expected = init(model)
    for given in (plain, to_torch(expected)):
        found = from_torch(given, model)
        assert [stats.pop("count") for stats in found["batch_stats"].values()] == [0, 0]
        chex.assert_trees_all_equal_shapes_and_dtypes(found, jax.tree.map(np.asarray, expected))
    surplus = {"weight": use_scale, "bias": use_bias}
    surplus = [f"{k}.{leaf}" for k in (1, 4) for leaf, used in surplus.items() if not used]
    if surplus:
        with pytest.raises(ValueError, match=f"model: surplus: {', '.join(surplus)}$"):
            from_torch(fresh_state_dict(), model)


def test_without_scale_and_bias_pytorch_has_affine_false(torch):
    model = MODEL.clone(norm="batch_no_affine")
    module, variables = mlp(torch, "float32", affine=False), init(model)
    found = to_torch(variables)
    module.load_state_dict({k: torch.tensor(v) for k, v in found.items()}, strict=True)
    x = normal((7, 6), "float32")
    y = model.apply(variables, x, train=False)
    np.testing.assert_allclose(y, evaluate(torch, module, x), rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_equal(to_torch(flax.core.freeze(variables)), found)


def test_tensors_that_numpy_cannot_hold_are_named(torch):
    state_dict = fresh_state_dict()
    state_dict["0.bias"] = torch.zeros(4, requires_grad=True)
    with pytest.raises(ValueError, match=r"0\.bias cannot be read as a NumPy array"):
        from_torch(state_dict, MODEL)

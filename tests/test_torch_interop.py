import re
import subprocess
import sys
from collections import OrderedDict
from functools import cache
from itertools import pairwise

import chex
import jax
import numpy as np
import optax
import pytest

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


def mlp(torch, dtype="float64", sizes=(6, 5, 4, 3), use_batch_norm=True):
    """The network in PyTorch, with normalization as after three batches of training."""
    *hidden, outputs = pairwise(sizes)
    layers = []
    for fan_in, size in hidden:
        norm = torch.nn.BatchNorm1d(size)
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
        norm.num_batches_tracked.fill_(3)
        layers += [torch.nn.Linear(fan_in, size), *[norm][:use_batch_norm], torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(*outputs)).to(getattr(torch, dtype))


def normal(shape, dtype="float64"):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def evaluate(torch, module, x):
    return module.eval()(torch.tensor(x)).detach().numpy()


@cache
def fresh_state_dict():
    return to_torch(MODEL.init(jax.random.key(0), normal((2, 6), "float32"), train=True))


def test_torch_is_not_imported():
    check = "import sys, bnjax.torch_interop; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-14)])
@pytest.mark.parametrize("use_batch_norm", [True, False])
def test_there_and_back(torch, use_batch_norm, dtype, tolerance):
    module, other = (mlp(torch, dtype, use_batch_norm=use_batch_norm) for _ in range(2))
    model = MODEL.clone(use_batch_norm=use_batch_norm)
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


SURPLUS = {"8.weight": np.ones((3, 3)), "8.bias": np.ones(3)}
TRANSPOSED = {"3.weight": np.ones((5, 4))}


@pytest.mark.parametrize(
    ("removed", "added", "message"),
    [
        *(([key], {}, f"missing: {key}") for key in KEYS),
        (KEYS, {}, f"missing: {', '.join(KEYS)}"),
        ([], SURPLUS, "surplus: 8.weight, 8.bias"),
        ([], TRANSPOSED, "of wrong shape: 3.weight [5, 4] (expected [4, 5])"),
        ([], {"0.weight": np.ones(5)}, "of wrong shape: 0.weight [5] (expected [5, any])"),
        (
            ["0.bias", "6.weight"],
            SURPLUS | TRANSPOSED,
            "missing: 0.bias, 6.weight; surplus: 8.weight, 8.bias; "
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


def test_a_sorted_state_dict_is_read_by_its_names():
    model = MLP((4,) * 5, 4, use_batch_norm=False)
    sizes = [(4, 4)] * 6
    state_dict = {f"{2 * k}.weight": np.full(s, k, np.float32) for k, s in enumerate(sizes)}
    state_dict |= {f"{2 * k}.bias": np.full(4, k, np.float32) for k in range(6)}
    params = from_torch(dict(sorted(state_dict.items())), model)["params"]
    assert [int(params[f"Dense_{k}"]["kernel"][0, 0]) for k in range(6)] == list(range(6))


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


def test_numbered_layers_behind_a_prefix_are_read_by_their_numbers():
    model = MLP((4,) * 5, 4, use_batch_norm=False)
    numbers = (0, 3, 6, 9, 12, 15)
    state_dict = {f"net.{n}.weight": np.full((4, 4), n, np.float32) for n in numbers}
    state_dict |= {f"net.{n}.bias": np.zeros(4, np.float32) for n in numbers}
    params = from_torch(dict(sorted(state_dict.items())), model)["params"]
    assert [int(params[f"Dense_{k}"]["kernel"][0, 0]) for k in range(6)] == list(numbers)


def test_tensors_that_numpy_cannot_hold_are_named(torch):
    state_dict = fresh_state_dict()
    state_dict["0.bias"] = torch.zeros(4, requires_grad=True)
    with pytest.raises(ValueError, match=r"0\.bias cannot be read as a NumPy array"):
        from_torch(state_dict, MODEL)

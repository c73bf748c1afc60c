"""A batch that several devices share, held against one device that has all of it.

These need eight devices: XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import dataclasses
import math
import re
import shutil
from collections import Counter
from functools import cache, partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from command import assert_same_numbers, call, lines_of
from factories import norm_of

from bnjax import models, paired, training
from bnjax.layers import BatchNorm
from bnjax.paired import Arm, Placement, Trainer
from bnjax.parallel import mesh as mesh_module
from bnjax.parallel.mesh import make_mesh, replicate_data
from bnjax.torch_interop import to_torch
from bnjax.training import Batch
from experiments.lab import arms, devices, rundir
from experiments.lab.presets import BOOSTCOURSE

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

MODEL = models.MLP((16, 16), 10)
MESHES = [(1, 3), (2, 4), (1, 8)]
MOMENTUM = partial(BatchNorm, momentum=0.9, ddof=1)
SGD = optax.sgd(0.1)


def examples(count, dtype):
    rng = np.random.default_rng(0)
    images = rng.normal(3, 1, (count, 12)).astype(dtype)
    return Batch(images, rng.integers(0, 10, count).astype(np.int32))


MANY, FEW = examples(100, np.float32), examples(16, np.float32)


def make_arm(norm="batch", optimizer=None, **settings):
    module = models.MLP((16, 16), 10, norm, **settings)
    return Arm("arm", module, optimizer or optax.adam(1e-3))


def cast(state, dtype):
    return jax.tree.map(
        lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, state
    )


def train(mesh, batch_size, count, dtype, arm, statistics="global"):
    """One epoch of two replicates: the states after it, and the loss of each step."""
    data, keys = examples(count, dtype), paired.replicate_keys(0, 2)
    trainer = Trainer([Placement((arm,), mesh)], keys, data, data, batch_size)
    states = cast(trainer.initial_states(), dtype)
    states, steps = paired.train_epoch(
        states,
        keys,
        1,
        replicate_data(data, mesh),
        batch_size=batch_size,
        drop_last=False,
        mesh=mesh,
        statistics=statistics,
    )
    losses = np.asarray(steps["arm"].loss) / np.asarray(steps["arm"].examples)
    return jax.tree.map(np.asarray, states["arm"].variables), losses


@cache
def train_alone(batch_size, count, dtype):
    return train(make_mesh(), batch_size, count, dtype, make_arm())


@pytest.mark.skipif(not jax.config.jax_enable_x64, reason="needs JAX_ENABLE_X64=1")
@pytest.mark.parametrize("batch_size", [32, 30, 7])
@pytest.mark.parametrize("mesh", MESHES)
def test_global_statistics_are_those_of_one_device_after_fifty_steps(mesh, batch_size):
    count = 50 * batch_size
    alone, _ = train_alone(batch_size, count, np.float64)
    shared, _ = train(make_mesh(*mesh), batch_size, count, np.float64, make_arm())
    for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(alone), strict=True):
        assert a.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("batch_size", [32, 30, 7])
@pytest.mark.parametrize("mesh", MESHES[1:])
def test_global_statistics_in_float32_give_the_same_first_losses(mesh, batch_size):
    count = 10 * batch_size
    _, alone = train_alone(batch_size, count, np.float32)
    _, shared = train(make_mesh(*mesh), batch_size, count, np.float32, make_arm())
    assert shared.shape == (2, 10)
    np.testing.assert_allclose(shared, alone, rtol=1e-5)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_local_statistics_are_those_of_each_share_of_the_batch(devices):
    """Ghost batch normalization is the same on one device; the running statistics are not."""
    sgd = optax.sgd(0.1)
    norm = partial(MOMENTUM, virtual_batch_size=32 // devices)
    ghost = make_arm(norm_of(norm), sgd)
    alone, expected = train(make_mesh(), 32, 96, np.float32, ghost)
    mesh = make_mesh(1, devices)
    shared, losses = train(mesh, 32, 96, np.float32, make_arm(optimizer=sgd), "local")
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for a, b in zip(
        jax.tree.leaves(shared["params"]), jax.tree.leaves(alone["params"]), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def step_on(devices):
    """A step in which each of so many devices has its own share of the batch."""
    return jax.jit(
        jax.shard_map(
            partial(training.train_step, axis_name="data"),
            mesh=make_mesh(1, devices),
            in_specs=(jax.P(), jax.P("data")),
            out_specs=jax.P(),
            check_vma=False,
        )
    )


@pytest.mark.parametrize("dropout_rate", [0.0, 0.5])
def test_each_device_drops_on_its_own(dropout_rate):
    one = examples(16, np.float32)
    two = jax.tree.map(lambda a: np.concatenate([a, a]), one)
    model = models.MLP((64,), 10, norm=None, dropout_rate=dropout_rate)
    state = training.create_state(model, optax.sgd(0.1), jax.random.key(0), one.images)
    losses = [step_on(n)(state, batch)[1].loss for n, batch in ((1, one), (2, two))]
    assert np.isclose(2 * losses[0], losses[1], rtol=1e-5) == (dropout_rate == 0)


def test_local_running_statistics_are_those_of_the_first_device():
    data = examples(32, np.float32)
    state = training.create_state(MODEL, optax.sgd(0.0), jax.random.key(0), data.images)
    after, metrics = step_on(4)(state, data)
    own, _ = training.train_step(state, jax.tree.map(lambda a: a[:8], data))
    assert int(metrics.examples) == 32
    for a, b in zip(
        jax.tree.leaves(after.batch_stats), jax.tree.leaves(own.batch_stats), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.skipif(not jax.config.jax_enable_x64, reason="needs JAX_ENABLE_X64=1")
def test_local_statistics_are_those_of_pytorch_distributed():
    """Four ranks by hand: each normalizes its share, gradients are averaged, rank 0 is kept."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    data = examples(6 * 32, np.float64)
    sgd = optax.sgd(0.1, momentum=0.9)
    state = training.create_state(MODEL, sgd, jax.random.key(0), data.images)
    state = cast(state, np.float64)
    step, layers = step_on(4), torch.nn
    ranks = [
        layers.Sequential(
            *(layers.Linear(12, 16), layers.BatchNorm1d(16), layers.ReLU()),
            *(layers.Linear(16, 16), layers.BatchNorm1d(16), layers.ReLU()),
            layers.Linear(16, 10),
        ).double()
        for _ in range(4)
    ]
    weights = {name: torch.tensor(a) for name, a in to_torch(state.variables).items()}
    for rank in ranks:
        rank.load_state_dict(weights)
    optimizers = [torch.optim.SGD(rank.parameters(), 0.1, momentum=0.9) for rank in ranks]
    for begin in range(0, 6 * 32, 32):
        batch = jax.tree.map(lambda a, begin=begin: a[begin : begin + 32], data)
        state, _ = step(state, batch)
        for k, rank in enumerate(ranks):
            images, labels = (torch.tensor(a[8 * k : 8 * k + 8]) for a in batch)
            rank.zero_grad()
            layers.functional.cross_entropy(rank(images), labels.long()).backward()
        for same in zip(*(rank.parameters() for rank in ranks), strict=True):
            mean = torch.stack([one.grad for one in same]).mean(0)
            for one in same:
                one.grad = mean.clone()
        for optimizer in optimizers:
            optimizer.step()
    expected = ranks[0].state_dict()
    for name, ours in to_torch(state.variables).items():
        if "num_batches" not in name:
            np.testing.assert_allclose(ours, expected[name].numpy(), atol=1e-13, err_msg=name)


@pytest.mark.parametrize("statistics", ["global", "local"])
def test_replicates_at_once_are_those_one_after_the_other(monkeypatch, statistics):
    arm, mesh = make_arm(optimizer=optax.sgd(0.1)), make_mesh(2, 4)
    results = []
    for at_once in (False, True):
        monkeypatch.setattr(mesh_module, "runs_at_once", lambda mesh, at_once=at_once: at_once)
        jax.clear_caches()
        results.append(train(mesh, 32, 320, np.float32, arm, statistics))
    jax.clear_caches()
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) "  # the arrays that result
    r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
ARRAY = re.compile(r"(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")  # bits of an element, and the shape


def count_collectives(program: str) -> list[tuple[str, int]]:
    """Kind and bytes of each communication in a compiled program, given its HLO as text."""
    found = []
    for arrays, kind in COLLECTIVE.findall(program):
        sizes = (
            int(bits or 8) // 8 * math.prod(int(n) for n in shape.split(",") if n)
            for bits, shape in ARRAY.findall(arrays)
        )
        found.append((kind, sum(sizes)))
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("%a = f32[16]{0} all-reduce(f32[16]{0} %x), channel_id=1", [("all-reduce", 64)]),
        ("%a = (f32[2,3]{1,0}, s32[]) all-reduce(%x, %y)", [("all-reduce", 28)]),
        (
            "%a = f64[4]{0} all-gather-start(%x)\n%b = bf16[4]{0} all-to-all(%a)",
            [("all-gather", 32), ("all-to-all", 8)],
        ),
        ("%a = f32[16]{0} all-reduce-done(%x)\n%b = f32[3]{0} add(%a, %all-reduce.3)", []),
    ],
)
def test_communication_is_counted(text, expected):
    assert count_collectives(text) == expected


def test_one_device_communicates_nothing():
    program = jax.jit(lambda x: x.sum()).lower(np.ones(4, np.float32)).compile().as_text()
    assert count_collectives(program) == []


def compiled(mesh, replicates, data, batch_size, arm, statistics) -> str:
    """The compiled program of an epoch, as text."""
    mesh, keys = make_mesh(*mesh), paired.replicate_keys(0, replicates)
    placement = Placement((arm,), mesh)
    program = paired.train_epoch.lower(
        Trainer([placement], keys, data, data, batch_size).initial_states(),
        keys,
        1,
        replicate_data(data, mesh),
        batch_size=batch_size,
        drop_last=True,
        mesh=mesh,
        statistics=statistics,
    )
    return program.compile().as_text()


def collectives(mesh, replicates, batch_size, depth, norm="batch", statistics="global"):
    """What the devices do together in a step, as the compiled program of an epoch has it."""
    arm = Arm("arm", models.MLP((16,) * depth, 10, norm), optax.adam(1e-3))
    data = examples(4 * batch_size, np.float32)
    program = compiled(mesh, replicates, data, batch_size, arm, statistics)
    return Counter(kind for kind, _ in count_collectives(program))


@pytest.mark.parametrize(
    ("mesh", "replicates", "batch_size", "depth"),
    [((1, 4), 1, 32, 1), ((1, 4), 3, 30, 2), ((2, 4), 4, 32, 2), ((1, 3), 1, 600, 5)],
)
def test_a_layer_communicates_twice_forward_and_once_backward(mesh, replicates, batch_size, depth):
    found = collectives(mesh, replicates, batch_size, depth)
    assert found == {"all-reduce": 1 + 3 * depth}


@pytest.mark.parametrize("mesh", [(1, 4), (2, 4)])
def test_without_normalization_only_gradients_and_losses_are_summed(mesh):
    assert collectives(mesh, 2, 32, 3, norm=None) == {"all-reduce": 1}


@pytest.mark.parametrize("depth", [1, 3])
def test_local_statistics_cost_no_communication_of_their_own(depth):
    """Gradients, losses and running statistics in one, the number of examples in another."""
    assert collectives((1, 4), 1, 32, depth, statistics="local") == {"all-reduce": 2}


@pytest.mark.parametrize(
    ("arm", "statistics", "count", "kilobytes"),
    [("bn", "global", 7, 173.8), ("bn", "local", 2, 173.3), ("no_bn", "global", 1, 172.3)],
)
def test_a_step_of_boostcourse_sends_what_the_readme_says(arm, statistics, count, kilobytes):
    (made,) = arms.make_arms(dataclasses.replace(BOOSTCOURSE, arms=(arm,)))
    data = Batch(np.zeros((1024, 28, 28), np.uint8), np.zeros(1024, np.int32))
    found = count_collectives(compiled((1, 8), 1, data, 512, made, statistics))
    assert [kind for kind, _ in found] == ["all-reduce"] * count
    assert round(sum(size for _, size in found) / 1000, 1) == kilobytes


DIGITS = "--dataset", "digits", "--hidden-sizes", 8, 8, "--batch-size", 96, "--no-progress"


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A run of two epochs whose batches four devices share, each with its own statistics."""
    path = tmp_path_factory.mktemp("local") / "run"
    mesh = "--mesh", "replicate=2,data=4", "--replicates", 2
    result = call(*DIGITS, *mesh, "--bn-statistics", "local", "--epochs", 2, "--out", path)
    assert result.status == 0, result.err
    return path


def test_the_command_computes_the_same_on_any_mesh(tmp_path):
    settings = "--replicates", 2, "--epochs", 2, "--learning-rate", 1e-4
    alone, *others = (tmp_path / name for name in ("replicate=1", "replicate=2,data=2", "auto"))
    for path in (alone, *others):
        result = call(*DIGITS, *settings, "--mesh", path.name, "--out", path)
        assert result.status == 0, result.err
    for path, data in zip(others, (2, 1), strict=True):
        assert rundir.read_config(path)["mesh"] == {"replicate": 2, "data": data}
        assert_same_numbers(path, alone)


def test_local_statistics_of_the_command_differ_in_the_network_that_has_them(local, tmp_path):
    path = tmp_path / "run"
    mesh = "--mesh", "replicate=2,data=4", "--replicates", 2
    assert call(*DIGITS, *mesh, "--epochs", 2, "--out", path).status == 0
    for a, b in zip(lines_of(local), lines_of(path), strict=True):
        assert np.isclose(a["train_cost"], b["train_cost"], rtol=1e-4) == (a["arm"] == "no_bn")


def test_a_run_with_local_statistics_goes_on_with_as_many_devices(local, tmp_path):
    path = Path(shutil.copytree(local, tmp_path / "run"))
    result = call("--resume", path, "--epochs", 3, "--mesh", "data=2")
    assert result.status == 2
    assert "local statistics depend on how many devices share a batch" in result.err
    assert call("--resume", path, "--epochs", 3, "--mesh", "data=4").status == 0


@pytest.mark.parametrize(
    ("arguments", "batch"),
    [
        (("--mesh", "data=5"), 96),
        (("--mesh", "data=8", "--batch-size", 8), 8),
        (("--mesh", "data=2", "--no-drop-last"), 93),
    ],
)
def test_local_statistics_need_equal_shares_of_two(tmp_path, arguments, batch):
    out = tmp_path / "run"
    result = call(*DIGITS, "--bn-statistics", "local", *arguments, "--out", out)
    assert result.status == 2
    assert f"bn_statistics local: a batch of {batch} cannot be dealt to" in result.err
    assert not out.exists()


def deal(monkeypatch, arms, replicates, count):
    """The placements of so many arms where there are so many devices."""
    there = jax.devices()[:count]
    monkeypatch.setattr(jax, "devices", lambda: there)
    made = (dataclasses.replace(make_arm(optimizer=SGD), name=f"arm {k}") for k in range(arms))
    return devices.make_placements(tuple(made), "auto", replicates)


@pytest.mark.parametrize(
    ("arms", "replicates", "count", "meshes"),
    [
        (2, 1, 2, ["0", "1"]),
        (2, 1, 8, ["0", "1"]),
        (2, 3, 8, ["012", "345"]),
        (2, 20, 8, ["0123", "4567"]),
        (2, 4, 1, ["0", "0"]),
        (3, 1, 2, ["0", "1", "0"]),
        (3, 4, 2, ["01", "01", "01"]),
        (3, 4, 8, ["01", "23", "45"]),
        (5, 1, 2, ["0", "1", "0", "1", "0"]),
        (5, 2, 4, ["01", "23", "01", "23", "01"]),
        (5, 2, 3, ["01", "01", "01", "01", "01"]),
    ],
)
def test_arms_have_devices_of_their_own_or_share_them(monkeypatch, arms, replicates, count, meshes):
    placements = deal(monkeypatch, arms, replicates, count)
    assert [
        "".join(str(d.id) for d in placement.mesh.devices.flat) for placement in placements
    ] == meshes
    assert {placement.mesh.shape["data"] for placement in placements} == {1}
    assert [arm.name for placement in placements for arm in placement.arms] == [
        f"arm {k}" for k in range(arms)
    ]


def train_arms(placements, replicates):
    """What an epoch leaves of each arm: variables and metrics, of each replicate."""
    keys = paired.replicate_keys(0, replicates)
    trainer = Trainer(placements, keys, MANY, FEW, batch_size=32)
    (epoch,) = trainer.epochs(trainer.initial_states(), range(1, 2))
    return {
        name: jax.tree.map(
            np.asarray, (state.variables, epoch.steps[name], epoch.train[name], epoch.test[name])
        )
        for name, state in epoch.states.items()
    }


@pytest.fixture(scope="module")
def on_one_device():
    with pytest.MonkeyPatch.context() as patch:
        return train_arms(deal(patch, 5, 4, 1), 4)


@pytest.mark.parametrize(
    ("arms", "replicates", "count"),
    [(2, 2, 8), (2, 4, 8), (3, 1, 2), (3, 4, 2), (5, 1, 3), (5, 2, 4), (5, 4, 3)],
)
def test_numbers_do_not_depend_on_how_many_devices_there_are(
    monkeypatch, on_one_device, arms, replicates, count
):
    found = train_arms(deal(monkeypatch, arms, replicates, count), replicates)
    expected = {name: on_one_device[name] for name in found}
    chex.assert_trees_all_equal(found, jax.tree.map(lambda a: a[:replicates], expected))

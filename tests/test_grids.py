"""Grids of settings: every point is the run that it would be alone."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnjax import diagnostics, initializers, models, paired
from bnjax.paired import Arm, Epoch, Placement, Trainer
from bnjax.parallel.mesh import make_mesh
from bnjax.training import Batch, Metrics
from experiments.claims.grids import (
    GridPoint,
    accuracy,
    epochs_of,
    look_into,
    networks,
    stack,
    train_grid,
)

REPLICATES, BATCH, WIDTH = 2, 8, 40


def he(fan_in: int, fan_out: int) -> float:
    return math.sqrt(2 / fan_in)


def xavier(fan_in: int, fan_out: int) -> float:
    return math.sqrt(2 / (fan_in + fan_out))


POINTS = (GridPoint(0.1, he), GridPoint(0.5, xavier), GridPoint(0.1, xavier))


def examples(count=40, seed=0) -> Batch:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 4, 4)).astype(np.uint8)
    return Batch(images, rng.integers(0, 10, count).astype(np.int32))


TRAIN, TEST = examples(), examples(16, seed=1)


def keys() -> jax.Array:
    return paired.replicate_keys(0, REPLICATES)


def grid(points) -> list[Epoch]:
    """Two epochs; the states of the first are gone."""
    sizes = {"epochs": 2, "batch_size": BATCH, "hidden_sizes": (WIDTH,)}
    return list(train_grid(points, keys(), TRAIN, TEST, **sizes))


@pytest.fixture(scope="module")
def trained() -> list[Epoch]:
    return grid(POINTS)


@pytest.fixture(scope="module")
def initial() -> paired.States:
    """The states before training, which a rate of 0 leaves as they were."""
    still = [GridPoint(0.0, point.std) for point in POINTS]
    return jax.tree.map(np.asarray, grid(still)[-1].states)


def of_point(tree, number):
    return jax.tree.map(lambda a: np.split(np.asarray(a), len(POINTS))[number], tree)


@pytest.mark.slow
def test_a_point_is_bitwise_what_it_is_alone(trained):
    alone = grid(POINTS[1:2])

    def numbers(run):
        states = {arm: (s.params, s.batch_stats) for arm, s in run[-1].states.items()}
        epochs = [(epoch.steps, epoch.train, epoch.test) for epoch in run]
        return jax.tree.map(np.asarray, (states, epochs))

    chex.assert_trees_all_equal(of_point(numbers(trained), 1), numbers(alone))


def scaled(state, std):
    """Standard normal kernels scaled by layer and no Dense biases, of R replicates."""
    params = {name: dict(values) for name, values in state.params.items()}
    for name in ("Dense_0", "Dense_1"):
        kernel = params[name]["kernel"]
        params[name]["kernel"] = kernel * np.float32(std(*kernel.shape[1:]))
        params[name]["bias"] = 0 * params[name]["bias"]
    return state.replace(params=params)


def test_a_point_is_plain_sgd_from_scaled_normal_kernels(trained):
    normal, rate = initializers.normal(1.0), POINTS[1].learning_rate
    arms = [
        Arm(
            name,
            models.MLP((WIDTH,), 10, "batch" if use else None, kernel_init=normal),
            optax.sgd(rate),
        )
        for name, use in (("bn", True), ("no_bn", False))
    ]
    placements = [Placement((arm,), make_mesh()) for arm in arms]
    trainer = Trainer(placements, keys(), TRAIN, TEST, BATCH)
    states = trainer.initial_states()
    states = {name: scaled(state, POINTS[1].std) for name, state in states.items()}
    plain = trainer.epochs(states, range(1, 3))
    for found, expected in zip(trained, plain, strict=True):
        for arm in ("bn", "no_bn"):
            for part in ("steps", "train", "test"):
                mine, other = (getattr(epoch, part)[arm].loss for epoch in (found, expected))
                np.testing.assert_allclose(of_point(mine, 1), other, rtol=1e-5)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("arm", ["bn", "no_bn"])
def test_initial_kernels_have_the_deviation_of_their_shape(initial, arm, number):
    params = of_point(initial[arm].params, number)
    for layer, sizes in (("Dense_0", (16, WIDTH)), ("Dense_1", (WIDTH, 10))):
        kernel = params[layer]["kernel"]
        assert kernel.shape == (REPLICATES, *sizes)
        four_errors = 4 / math.sqrt(2 * kernel.size)
        assert kernel.std() == pytest.approx(POINTS[number].std(*sizes), rel=four_errors)
        assert (kernel[0] != kernel[1]).all()
        assert not params[layer]["bias"].any()
    if arm == "bn":
        assert (params["BatchNorm_0"]["scale"] == 1).all()
        assert not params["BatchNorm_0"]["bias"].any()


@pytest.mark.parametrize("arm", ["bn", "no_bn"])
def test_points_that_differ_in_their_rate_start_alike_and_part(trained, arm):
    losses = np.stack(np.split(trained[0].steps[arm].loss, len(POINTS)))  # [C, R, steps]
    np.testing.assert_array_equal(losses[1, :, 0], losses[2, :, 0])
    assert (losses[1, :, 1:] != losses[2, :, 1:]).all()
    assert (losses[0, :, 0] != losses[1, :, 0]).all()  # another initialization


def test_accuracy_counts_in_percent():
    metrics = Metrics(jnp.zeros(3), jnp.array([0, 3, 16]), jnp.array([16, 16, 16]))
    found = accuracy(Epoch(1, {}, {}, {}, {"bn": metrics}, 0.0))
    assert found["bn"].tolist() == [0.0, 18.75, 100.0]


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (15, 3), (17, 3), (18, 4), (1000, 200)])
def test_epochs_come_nearest_to_the_steps(steps, epochs):
    assert epochs_of(steps, BATCH, TRAIN) == epochs  # of five steps


def test_networks_are_twins():
    twins = networks(hidden_sizes=(7,))
    assert twins["bn"] == twins["no_bn"].clone(norm="batch") != twins["no_bn"]


def test_probes_see_each_replicate(trained):
    twins = networks(hidden_sizes=(WIDTH,))
    found = look_into(diagnostics.features, twins, trained[-1].states, TEST)
    for arm, model in twins.items():
        second = jax.tree.map(lambda a: a[1], trained[-1].states[arm].variables)
        expected = diagnostics.features(model, second, TEST)["features_1"]
        np.testing.assert_allclose(found[arm]["features_1"][1], expected, rtol=1e-5, atol=1e-6)


def test_stacks_what_was_found_after_every_epoch():
    found = stack({"a": (np.full(3, k), np.full((3, 2), k))} for k in range(4))
    assert [values.shape for values in found["a"]] == [(3, 4), (3, 4, 2)]
    np.testing.assert_array_equal(found["a"][0][0], range(4))

"""Grids of settings: every point is the run that it would be alone."""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnjax import initializers, models, paired
from bnjax.paired import Arm, Epoch, Placement, Trainer
from bnjax.parallel.mesh import make_mesh
from bnjax.training import Batch, Metrics
from experiments.claims.grids import GridPoint, accuracy, by_point, epochs_of, networks, train_grid

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


class Run(NamedTuple):
    """The initial states and two epochs; the states of the first epoch are gone."""

    initial: paired.States
    epochs: tuple[Epoch, Epoch]


def grid(points) -> Run:
    initial = {}
    first, last = train_grid(
        points,
        keys(),
        TRAIN,
        TEST,
        epochs=2,
        batch_size=BATCH,
        at_start=lambda states: initial.update(jax.tree.map(np.array, states)),
        hidden_sizes=(WIDTH,),
    )
    return Run(initial, (first, last))


@pytest.fixture(scope="module")
def trained() -> Run:
    return grid(POINTS)


def of_point(tree, number):
    return jax.tree.map(lambda a: by_point(np.asarray(a), POINTS)[number], tree)


def test_a_point_is_bitwise_what_it_is_alone(trained):
    alone = grid(POINTS[1:2])

    def numbers(run):
        states = {arm: (s.params, s.batch_stats) for arm, s in run.epochs[-1].states.items()}
        epochs = [(epoch.steps, epoch.train, epoch.test) for epoch in run.epochs]
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
    for found, expected in zip(trained.epochs, plain, strict=True):
        for arm in ("bn", "no_bn"):
            for part in ("steps", "train", "test"):
                mine, other = (getattr(epoch, part)[arm].loss for epoch in (found, expected))
                np.testing.assert_allclose(of_point(mine, 1), other, rtol=1e-5)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("arm", ["bn", "no_bn"])
def test_initial_kernels_have_the_deviation_of_their_shape(trained, arm, number):
    params = of_point(trained.initial[arm].params, number)
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
    losses = by_point(np.asarray(trained.epochs[0].steps[arm].loss), POINTS)  # [C, R, steps]
    np.testing.assert_array_equal(losses[1, :, 0], losses[2, :, 0])
    assert (losses[1, :, 1:] != losses[2, :, 1:]).all()
    assert (losses[0, :, 0] != losses[1, :, 0]).all()  # another initialization


def test_by_point_unfolds_points_before_replicates():
    values = np.arange(len(POINTS) * 3 * 2).reshape(-1, 2)
    unfolded = by_point(values, POINTS)
    assert unfolded.shape == (len(POINTS), 3, 2)
    np.testing.assert_array_equal(unfolded[1], values[3:6])


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

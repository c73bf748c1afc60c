"""Finding the step and the layer in which a network stopped being finite."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnjax import models, paired, training
from bnjax.errors import CheckpointError
from bnjax.paired import Epoch, Trainer
from bnjax.training import Batch, Metrics
from experiments.lab import divergences

KEY = jax.random.key(0)
EXAMPLES = Batch(
    jax.random.normal(KEY, (50, 6), jnp.float32), jax.random.randint(KEY, (50,), 0, 3, jnp.int32)
)
MODEL = models.MLP((8, 8, 8), 3, norm=None)


@pytest.mark.parametrize(
    ("losses", "evaluated", "step"),
    [
        ([0.1, 0.2], 0.1, "none"),
        ([np.nan, 0.1], 0.1, 1),
        ([0.1, np.inf, np.nan], np.nan, 2),
        ([0.1, 0.2], np.inf, None),
    ],
)
def test_a_divergence_is_found_once_with_its_step_from_1(losses, evaluated, step):
    steps, ends = (Metrics(np.array([a]), None, None) for a in (losses, evaluated))
    fine = Metrics(np.zeros(1), None, None)
    epoch = Epoch(4, {}, {"a": steps}, {"a": fine}, {"a": ends}, 0.0)
    expected = {"arm": "a", "replicate": 0, "epoch": 4, "step": step, "layer": None}
    assert divergences.find(epoch, []) == ([] if step == "none" else [expected])
    assert divergences.find(epoch, [expected]) == []


def state(rate: float = 0.0):
    return training.create_state(MODEL, optax.sgd(rate), KEY, EXAMPLES.images)


def trainer():
    """Of one replicate, in batches of 8."""
    return Trainer([], paired.replicate_keys(0, 1), EXAMPLES, EXAMPLES, batch_size=8)


def broken(layer: str, value: float = jnp.inf):
    fresh = state()
    kernel = fresh.params[layer]["kernel"].at[0].set(value)
    params = {**fresh.params, layer: {**fresh.params[layer], "kernel": kernel}}
    return fresh.replace(params=params)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("layer", ["Dense_0", "Dense_1", "Dense_2", "Dense_3"])
def test_names_the_first_layer_that_is_not_finite(layer, train):
    assert divergences.first_layer(broken(layer), EXAMPLES, train=train) == layer
    assert divergences.first_layer(state(), EXAMPLES, train=train) is None


class Pair(nn.Module):
    """A module of a user's own that returns more than one array."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x), {"loss": jnp.log(x.sum() * 0)}


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x, _ = Pair()(nn.Dense(3)(x))
        return x


def test_modules_within_modules_are_named_by_their_paths():
    lost = training.create_state(Nested(), optax.sgd(0.0), KEY, EXAMPLES.images)
    assert divergences.first_layer(lost, EXAMPLES, train=True) == "Pair_0"
    lost.params["Pair_0"]["Dense_0"]["bias"] = jnp.full(4, jnp.nan)
    assert divergences.first_layer(lost, EXAMPLES, train=True) == "Pair_0/Dense_0"


def test_running_statistics_matter_in_evaluation_only():
    model = models.MLP((8, 8), 3)
    fresh = training.create_state(model, optax.sgd(0.0), KEY, EXAMPLES.images)
    mean = {"mean": jnp.full(8, jnp.nan), "var": jnp.ones(8)}
    lost = fresh.replace(batch_stats={**fresh.batch_stats, "BatchNorm_1": mean})
    assert divergences.first_layer(lost, EXAMPLES, train=True) is None
    assert divergences.first_layer(lost, EXAMPLES, train=False) == "BatchNorm_1"


def test_a_loss_alone_is_named():
    examples = EXAMPLES._replace(labels=EXAMPLES.labels + 7)  # labels that are no class
    assert divergences.first_layer(state(), examples, train=True) == "loss"


@pytest.mark.parametrize("rate", [3e6, 1e30])
def test_an_epoch_is_gone_through_as_training_did(rate):
    before, order = state(rate), paired.derive(trainer().keys[0], "order", 2)
    after, steps = training.train_epoch(before, EXAMPLES, order, batch_size=8, drop_last=False)
    first = int(np.argmin(np.isfinite(steps.loss))) + 1
    assert first > 1
    for step in range(1, first + 1):
        there, batch = divergences.replay(before, trainer(), 0, 2, step)
        assert there.step == step - 1
        layer = divergences.first_layer(there, batch, train=True)
        assert (layer is None) == (step < first)
    assert not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params))


def test_the_last_batch_of_an_epoch_may_be_short():
    _, batch = divergences.replay(state(), trainer(), 0, 1, 7)
    order = training.draw_order(paired.derive(trainer().keys[0], "order", 1), 50)
    np.testing.assert_array_equal(batch.labels, EXAMPLES.labels[order[48:]])


WHOLE = {"arm": "bn", "replicate": 0, "epoch": 1, "step": None, "layer": None}


@pytest.mark.parametrize(
    "content",
    [
        {},
        [1],
        [{"arm": "bn"}],
        *([WHOLE | change] for change in ({"epoch": True}, {"step": "1"}, {"layer": 3})),
    ],
)
def test_what_is_no_list_of_divergences_is_refused(tmp_path, content):
    (tmp_path / divergences.FILE).write_text(json.dumps([WHOLE]))
    assert divergences.read(tmp_path) == [WHOLE]
    (tmp_path / divergences.FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"divergences\.json is damaged"):
        divergences.read(tmp_path)

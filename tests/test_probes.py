"""What is recorded of both networks, against networks small enough to look into."""

from functools import partial

import jax
import numpy as np
import optax
import pytest
from factories import Nested
from flax.traverse_util import flatten_dict

from bnjax import diagnostics, models, paired, population, training
from bnjax.paired import Arm, Placement, Trainer
from bnjax.parallel.mesh import make_mesh
from bnjax.training import Batch
from experiments.lab import probes

MODULES = {
    "bn": models.MLP((6, 5), 10),
    "no_bn": models.MLP((6, 5), 10, norm=None),
    "own": Nested(2),
}
preactivations = jax.jit(diagnostics.preactivations, static_argnums=0)
gradient_norms = jax.jit(diagnostics.gradient_norms, static_argnums=0)


@pytest.fixture(scope="module")
def trained():
    """Two replicates after an epoch, with what they saw."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (700, 8, 8)).astype(np.uint8)
    data = Batch(images, rng.integers(0, 10, 700).astype(np.int32))
    arms = tuple(Arm(name, module, optax.adam(1e-2)) for name, module in MODULES.items())
    placements = [Placement((arm,), make_mesh()) for arm in arms]
    trainer = Trainer(placements, paired.replicate_keys(0, 2), data, data, batch_size=50)
    (epoch,) = trainer.epochs(trainer.initial_states(), range(1, 2))
    return trainer, epoch.states, data


def variables_of(states, arm, replicate=0):
    return jax.tree.map(lambda leaf: leaf[replicate], states[arm].variables)


@pytest.mark.parametrize("replicate", [0, 1])
@pytest.mark.parametrize("arm", MODULES)
def test_an_epoch_is_looked_at_with_the_diagnostics(trained, arm, replicate):
    trainer, states, data = trained
    example, sample = (jax.tree.map(lambda a, n=n: a[:n], data) for n in (1, probes.SAMPLE))
    found = probes.after_epoch(trainer, states, example)
    module, variables = MODULES[arm], variables_of(states, arm, replicate)
    entering = [np.asarray(x) for x in preactivations(module, variables, sample).values()]
    norms = gradient_norms(module, variables, sample)
    expected = {
        **diagnostics.features(module, variables, example),
        "gradient_norms": list(norms.values()),
        "percentiles": [np.percentile(values, probes.PERCENTILES) for values in entering],
        "edges": [np.linspace(values.min(), values.max(), probes.BINS + 1) for values in entering],
    }
    for name, values in expected.items():
        close = {"rtol": 1e-4, "atol": 1e-5}
        np.testing.assert_allclose(found[f"{arm}/{name}"][replicate], np.array(values), **close)
    counts = found[f"{arm}/histograms"][replicate]
    np.testing.assert_array_equal(counts.sum(axis=1), [values.size for values in entering])


@pytest.mark.parametrize("replicate", [0, 1])
def test_the_end_is_of_one_replicate(trained, replicate):
    trainer, states, data = trained
    found = probes.at_end(trainer, states, replicate)
    right = {}
    for arm in trainer.arms:
        logits, _ = training.forward(
            jax.tree.map(lambda leaf: leaf[replicate], states[arm]), data.images, train=False
        )
        np.testing.assert_array_equal(found[f"{arm}/predictions"], logits.argmax(axis=1))
        right[arm] = np.asarray(logits.argmax(axis=1)) == data.labels
    for arm in MODULES:
        others = np.any([right[other] for other in MODULES if other != arm], axis=0)
        only = np.flatnonzero(right[arm] & ~others)[: probes.KEPT]
        assert len(only) > 0
        np.testing.assert_array_equal(found[f"only_{arm}"], only)
        np.testing.assert_array_equal(found[f"images_{arm}"], data.images[only])


@pytest.mark.parametrize(
    ("arm", "layers"),
    [("bn", ["BatchNorm_0", "BatchNorm_1"]), ("own", [f"Block_{k}/BatchNorm_0" for k in (0, 1)])],
)
def test_the_end_has_running_statistics_and_those_of_the_training_set(trained, arm, layers):
    trainer, states, data = trained
    found = probes.at_end(trainer, states, 0)
    variables = variables_of(states, arm)
    estimated = population.estimate(MODULES[arm], variables, [data.images])
    for kind, expected in (("running", variables), ("population", estimated)):
        statistics = flatten_dict(expected["batch_stats"], sep="/")
        names = [f"{layer}/{name}" for layer in layers for name in ("mean", "var")]
        prefix = f"{arm}/{kind}/"
        assert [name for name in found if name.startswith(prefix)] == [prefix + n for n in names]
        for name in names:
            np.testing.assert_allclose(found[prefix + name], statistics[name], rtol=1e-4, atol=1e-6)


def test_layers_stand_in_the_order_of_their_calls_also_beyond_ten():
    module, images = Nested(11), np.zeros((4, 8, 8), np.uint8)
    init = jax.jit(partial(module.init, train=True))
    variables = init(jax.random.key(0), np.ones((2, 8, 8), np.float32))
    found = probes._statistics(module, jax.tree.map(np.asarray, variables), images)
    names = [f"Block_{k}/BatchNorm_0/{name}" for k in range(11) for name in ("mean", "var")]
    assert list(found) == [f"{kind}/{name}" for kind in ("running", "population") for name in names]


def test_predictions_beyond_the_classes_stay_what_they_are():
    """The preset boostcourse has 512 outputs; 259 is not 3."""
    module = models.MLP((4,), 512, norm=None)
    images = np.zeros((3, 28, 28), np.uint8)
    init = jax.jit(partial(module.init, train=False))
    variables = init(jax.random.key(0), np.zeros((2, 784), np.float32))
    variables["params"]["Dense_1"]["bias"] = jax.nn.one_hot(259, 512) * 100
    batch = Batch(images, np.full(3, 3, np.int32))
    assert probes._predict(module, variables, batch).tolist() == [259] * 3

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnjax import diagnostics, models, paired, training
from bnjax.checkpoint import Checkpoints
from bnjax.paired import Arm, Placement, Trainer
from bnjax.parallel import mesh as mesh_module
from bnjax.parallel.mesh import make_mesh, parse_mesh
from bnjax.training import Batch


def examples(count=40, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 4, 4)).astype(np.uint8)
    return Batch(images, rng.integers(0, 10, count).astype(np.int32))


def arm(name, norm):
    return Arm(name, models.MLP((8,), 10, norm), ADAM)


ADAM = optax.adam(1e-2)
BN, NO_BN = arm("bn", "batch"), arm("no_bn", None)


def separate_placements():
    return [Placement((BN,), make_mesh()), Placement((NO_BN,), make_mesh())]


def make_trainer(placements, replicates=3, seed=0, **settings):
    keys = paired.replicate_keys(seed, replicates)
    return Trainer(placements, keys, examples(), examples(seed=1), batch_size=8, **settings)


def run(placements, replicates=3, seed=0, epochs=range(1, 3), states=None):
    """The epochs of a run, with the states copied."""
    trainer = make_trainer(placements, replicates, seed)
    results = trainer.epochs(states or trainer.initial_states(), epochs)
    return [epoch._replace(states=jax.tree.map(jnp.copy, epoch.states)) for epoch in results]


def take(tree, replicate):
    return jax.tree.map(lambda a: a[replicate], tree)


def test_every_leaf_has_a_replicate_axis_also_when_there_is_one():
    for replicates in (1, 3):
        (epoch,) = run(separate_placements(), replicates, epochs=range(1, 2))
        assert set(epoch.states) == {"bn", "no_bn"}
        chex.assert_tree_shape_prefix(epoch.states, (replicates,))
        chex.assert_tree_shape_prefix(epoch.steps, (replicates, 5))
        chex.assert_tree_shape_prefix((epoch.train, epoch.test), (replicates,))


def test_a_replicate_is_bitwise_the_same_among_any_number_of_others():
    alone, among = run(separate_placements(), 1)[-1], run(separate_placements(), 3)[-1]
    for part in ("states", "steps", "train", "test"):
        chex.assert_trees_all_equal(take(getattr(alone, part), 0), take(getattr(among, part), 0))


def test_replicates_differ_in_weights_and_order():
    (epoch,) = run(separate_placements(), epochs=range(1, 2))
    losses = epoch.steps["bn"].loss
    assert (losses[0] != losses[1]).all()


def test_a_replicate_is_its_arm_trained_alone():
    epochs = run(separate_placements())
    key = paired.replicate_keys(0, 3)[1]
    data = jax.tree.map(jnp.asarray, examples())
    for side in (BN, NO_BN):
        state = training.create_state(
            side.module, side.optimizer, paired.derive(key, f"init {side.name}"), data.images
        )
        for epoch in epochs:
            order = paired.derive(key, "order", epoch.number)
            state, steps = training.train_epoch(state, data, order, batch_size=8)
            np.testing.assert_allclose(epoch.steps[side.name].loss[1], steps.loss, rtol=1e-4)


def test_arms_meet_the_same_batches_in_one_program_or_in_two():
    twin = Arm("twin", NO_BN.module, NO_BN.optimizer)
    mesh = make_mesh()
    together = [Placement((NO_BN, twin), mesh)]
    apart = [Placement((NO_BN,), mesh), Placement((twin,), mesh)]
    for placements in (together, apart):
        states = make_trainer([Placement((NO_BN,), mesh)], 1).initial_states()
        states["twin"] = jax.tree.map(jnp.copy, states["no_bn"]).replace(apply_fn=twin.module.apply)
        (epoch,) = run(placements, 1, epochs=range(1, 2), states=states)
        np.testing.assert_array_equal(epoch.steps["no_bn"].loss, epoch.steps["twin"].loss)


def test_seeds_and_purposes_give_different_keys():
    keys = [
        paired.derive(paired.replicate_keys(seed, 1)[0], purpose, epoch)
        for seed in (0, 1)
        for purpose in ("order", "dropout")
        for epoch in (1, 2)
    ]
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in keys}) == len(keys)


def test_a_run_goes_on_from_its_state_alone():
    whole = run(separate_placements(), epochs=range(1, 4))
    first = run(separate_placements(), epochs=range(1, 2))
    rest = run(separate_placements(), epochs=range(2, 4), states=first[-1].states)
    for later, expected in zip(rest, whole[1:], strict=True):
        chex.assert_trees_all_equal(later.states, expected.states)
        chex.assert_trees_all_equal(later.steps, expected.steps)


def test_checkpoints_give_back_the_state_bit_by_bit(tmp_path):
    epochs = run(separate_placements(), epochs=range(1, 4))
    checkpoints = Checkpoints(tmp_path)
    for epoch in epochs:
        checkpoints.save(epoch.number, epoch.states)
    fresh = make_trainer(separate_placements()).initial_states()
    done, states = Checkpoints(tmp_path).restore(fresh)
    assert done == 3
    chex.assert_trees_all_equal(states, epochs[-1].states)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "as AXIS=SIZE"),
        ("replicate", "as AXIS=SIZE"),
        ("replicate=2,replicate=3", "each axis once"),
        ("replicate=0", "sizes from 1"),
        ("replicate=two", "sizes from 1"),
        ("replicat=2", "did you mean 'replicate'"),
        ("replicate=1,date=2", "did you mean 'data'"),
        ("data=0", "sizes from 1"),
    ],
)
def test_malformed_meshes_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mesh(text)


def test_a_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(ValueError, match=r"needs 999 devices, found \d"):
        make_mesh(999)


def test_the_feature_probe_shows_what_leaves_each_layer():
    model = models.MLP((6, 5), 10)
    batch = jax.tree.map(jnp.asarray, examples(3))
    images = training.to_float(batch.images)
    variables = jax.jit(partial(model.init, train=True))(jax.random.key(0), images)
    probe = jax.jit(diagnostics.features, static_argnums=0)(model, variables, batch)
    apply = jax.jit(partial(model.apply, train=False, return_features=True))
    _, features = apply(variables, batch.images / 255)
    assert list(probe) == ["features_1", "features_2"]
    for ours, expected in zip(probe.values(), features, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_shared_init_gives_both_arms_the_same_dense_layers():
    states = make_trainer(separate_placements(), shared_init=True).initial_states()
    shared, own = (states[name].params for name in ("no_bn", "bn"))
    chex.assert_trees_all_equal(shared, {name: own[name] for name in shared})
    apart = make_trainer(separate_placements()).initial_states()
    kernels = [apart[name].params["Dense_0"]["kernel"] for name in ("no_bn", "bn")]
    assert (kernels[0] != kernels[1]).all()


def test_replicates_at_once_are_those_one_after_the_other(monkeypatch):
    one_by_one = run(separate_placements(), 3)
    monkeypatch.setattr(mesh_module, "runs_at_once", lambda mesh: True)
    jax.clear_caches()
    at_once = run(separate_placements(), 3)
    jax.clear_caches()
    for side in ("bn", "no_bn"):
        first, second = (epochs[0].steps[side].loss for epochs in (one_by_one, at_once))
        np.testing.assert_allclose(first, second, rtol=1e-5)


@pytest.fixture
def x64_everywhere():
    """float64 in the threads that compile the placements, too."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.slow
@pytest.mark.usefixtures("x64_everywhere")
def test_replicates_at_once_are_exact_in_float64(monkeypatch):
    placements, keys = separate_placements(), paired.replicate_keys(0, 3)
    data = Batch(examples().images / 255, examples().labels)
    results = []
    for at_once in (False, True):
        monkeypatch.setattr(mesh_module, "runs_at_once", lambda mesh, at_once=at_once: at_once)
        jax.clear_caches()
        trainer = Trainer(placements, keys, data, data, batch_size=8)
        states = trainer.initial_states()
        states = jax.tree.map(
            lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, states
        )
        (epoch,) = trainer.epochs(states, range(1, 2))
        results.append(epoch._replace(seconds=0.0))
    jax.clear_caches()
    assert results[0].steps["bn"].loss.dtype == np.float64
    for first, second in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-9, atol=1e-9)

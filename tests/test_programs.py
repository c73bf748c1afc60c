"""The library inside people's own programs: exported, under `shard_map`, with strict dtypes, with
NumPy's arrays, masks as Flax has them, and variables in containers of other kinds."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import norm_of
from flax.core import freeze
from jax import export
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from reference import batch_norm, relative_error

import bnjax
from bnjax import (
    cs231n,
    diagnostics,
    functional,
    losses,
    models,
    population,
    torch_interop,
    training,
)
from bnjax.functional import BatchStats
from bnjax.training import Batch

KEY = jax.random.key(0)
KINDS = {
    "plain": {},
    "ghost": {"virtual_batch_size": 4},
    "renormalized": {"renorm": (3.0, 5.0)},
    "cumulative": {"momentum": None},
    "all": {"virtual_batch_size": 4, "renorm": (3.0, 5.0), "momentum": None, "ddof": 1},
}


def normal(*shape, mean=0.0, seed=0):
    return np.random.default_rng(seed).normal(mean, 1, shape).astype(np.float32)


def examples(count=32):
    return Batch(normal(count, 6), np.arange(count, dtype=np.int32) % 3)


def make_state(layer=None, optimizer=None, **fields):
    norm = {"norm": norm_of(layer)} if layer else {}
    model = models.MLP((8, 8), 3, **norm, **fields)
    optimizer = optimizer or optax.sgd(0.1)
    return jax.jit(partial(training.create_state, model, optimizer))(KEY, np.ones((4, 6), "f"))


def exported(function, *shapes, constraints=()):
    """`function`, exported with symbolic shapes such as `(n, 6)`."""
    scope = export.SymbolicScope(constraints)
    specs = [
        jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), dtype)
        for shape, dtype in shapes
    ]
    return export.export(jax.jit(function))(*specs).call


class TestExport:
    """A symbolic batch: what comes out is what the function itself computes."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("rank", [pytest.param(2, marks=pytest.mark.slow), 4])
    def test_layer_in_training_with_gradients_and_masks(self, kind, rank):
        layer = bnjax.BatchNorm(use_running_average=False, **KINDS[kind])
        x = normal(8, *(3, 3)[: rank - 2], 6)
        variables = layer.init(KEY, x)

        def loss(x, mask=None):
            y, updates = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
            return jnp.sin(y).sum(), updates

        shape = f"(4*n, {', '.join(map(str, x.shape[1:]))})"
        masks = f"(4*n, {'1, 1, ' * (rank == 4)}1)"

        def run(x, mask):
            return jax.value_and_grad(loss, has_aux=True)(x), loss(x, mask)

        call = exported(run, (shape, "f"), (masks, bool))
        for count in (4, 300):
            x = normal(count, *x.shape[1:], mean=3)
            mask = np.random.default_rng(1).random((count, *(1,) * (rank - 1))) < 0.7
            assert_close(call(x, mask), jax.jit(run)(x, mask))

    def test_statistics_are_accurate_at_any_offset_and_number(self):
        layer = bnjax.BatchNorm(use_running_average=False, momentum=0.0)
        variables = layer.init(KEY, normal(4, 6))
        call = exported(
            lambda x: layer.apply(variables, x, mutable=["batch_stats"]), ("(n, 6)", "f")
        )
        for count in (2, 63, 64, 65, 4097, 300_000):
            x = normal(count, 6, mean=1e4)
            y, updates = call(x)
            expected, mean, var = batch_norm(x, np.ones(6), np.zeros(6))
            assert relative_error(y, expected) < 1e-6
            assert relative_error(updates["batch_stats"]["mean"], mean) < 1e-6
            assert relative_error(updates["batch_stats"]["var"], var) < 1e-6

    def test_the_first_variables(self):
        layer = bnjax.BatchNorm(use_running_average=False)
        init = exported(lambda x: layer.init(KEY, x), ("(n, 6)", "f"))
        assert_close(init(normal(5, 6)), layer.init(KEY, normal(5, 6)))

    def test_one_sample_leaves_the_statistics_alone(self):
        layer = bnjax.BatchNorm(use_running_average=False)
        variables = layer.init(KEY, normal(4, 6))
        call = exported(
            lambda x: layer.apply(variables, x, mutable=["batch_stats"]), ("(n, 6)", "f")
        )
        y, updates = call(normal(1, 6))
        np.testing.assert_array_equal(y, np.zeros((1, 6)))
        assert_close(updates["batch_stats"], variables["batch_stats"])

    def test_virtual_batches_must_be_known_to_divide_the_batch(self):
        layer = bnjax.BatchNorm(use_running_average=False, virtual_batch_size=4)
        variables = layer.init(KEY, normal(4, 6))

        def apply(x):
            return layer.apply(variables, x, mutable=["batch_stats"])

        told = r"virtual_batch_size is 4: .* batch of n examples, as an export knows of 4\*n"
        with pytest.raises(ValueError, match=told):
            exported(apply, ("(n, 6)", "f"))
        call = exported(apply, ("(n, 6)", "f"), constraints=["mod(n, 4) == 0"])
        assert_close(call(normal(12, 6)), apply(normal(12, 6)))

    @pytest.mark.parametrize("folded", [False, True])
    @pytest.mark.parametrize("shape", [pytest.param((6,), marks=pytest.mark.slow), (2, 3)])
    def test_networks(self, shape, folded):
        model = models.MLP((8, 5), 3, dropout_rate=0.3)
        variables = jax.jit(partial(model.init, train=True))(KEY, normal(4, *shape))
        if folded:
            model, variables = models.fold_batch_norm(model, variables)
        symbolic = f"(n, {', '.join(map(str, shape))})", "f"
        evaluate = partial(model.apply, variables, train=False)
        train = partial(
            model.apply, variables, train=True, mutable=["batch_stats"], rngs={"dropout": KEY}
        )
        call, call_training = exported(evaluate, symbolic), exported(train, symbolic)
        for count in (2, 70):
            x = normal(count, *shape)
            assert_close(call(x), jax.jit(evaluate)(x))
            assert_close(call_training(x), jax.jit(train)(x))

    def test_steps_and_evaluation(self):
        state = make_state(optimizer=optax.adam(0.1))

        def run(images, labels):
            batch = Batch(images, labels)
            after, metrics = training.train_step(state, batch)
            metrics_after = training.eval_step(after, batch), training.evaluate(after, batch)
            return after.variables, metrics, metrics_after

        call = exported(run, ("(n, 6)", "f"), ("(n,)", "i"))
        for count in (2, 40):
            assert_close(call(*examples(count)), jax.jit(run)(*examples(count)), 1e-4)

    def test_an_epoch_needs_a_batch_to_be_known(self):
        state = make_state()

        def run(images, labels):
            batch = Batch(images, labels)
            return training.train_epoch(state, batch, KEY, batch_size=8)[0].variables

        shapes = ("(n, 6)", "f"), ("(n,)", "i")
        call = exported(run, *shapes, constraints=["n >= 8"])
        assert_close(call(*examples(21)), run(*examples(21)))
        with pytest.raises(jax.errors.InconclusiveDimensionOperation, match="n"):
            exported(run, *shapes)

    @pytest.mark.parametrize("name", ["features", "preactivations", "gradient_norms"])
    def test_diagnostics(self, name):
        model = models.MLP((8, 5), 3)
        variables = jax.jit(partial(model.init, train=True))(KEY, normal(4, 6))

        def look(images, labels):
            return getattr(diagnostics, name)(model, variables, Batch(images, labels))

        call = exported(look, ("(n, 6)", "f"), ("(n,)", "i"))
        assert_close(call(*examples(9)), jax.jit(look)(*examples(9)))

    @pytest.mark.parametrize(
        "measure",
        [partial(diagnostics.saturation, activation=jnp.tanh), diagnostics.cosine_similarity],
    )
    def test_what_the_values_of_a_layer_say(self, measure):
        assert_close(exported(measure, ("(n, 6)", "f"))(normal(9, 6)), measure(normal(9, 6)))

    def test_the_course(self):
        ones = np.ones(6, np.float32)

        def run(x):
            out, cache, _ = cs231n.batchnorm_forward(x, ones, ones, {"mode": "train"})
            return cs231n.batchnorm_backward(out, cache), cs231n.batchnorm_backward_alt(out, cache)

        assert_close(exported(run, ("(n, 6)", "f"))(normal(9, 6)), jax.jit(run)(normal(9, 6)))


def assert_close(found, expected, tolerance=1e-5):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


class Masked(nn.Module):
    """A network that leaves some of its examples out of the statistics."""

    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x, train):
        y = self.norm(use_running_average=not train)(nn.Dense(8)(x), mask=x[:, 0] > -0.5)
        return nn.Dense(3)(nn.relu(y))


needs_devices = pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")


class TestShardMap:
    """In a user's own `shard_map`, whose default checks follow what varies over the devices."""

    @staticmethod
    def steps(state, batch):
        """A step, an epoch, and an evaluation, as a user spreads them over an axis `d`."""
        step = partial(training.train_step, axis_name="d")
        once, metrics = step(state, batch)
        after, _ = training.train_epoch(once, batch, KEY, batch_size=4, step=step)
        return once, metrics, after, jax.lax.psum(training.evaluate(after, batch), "d")

    @pytest.mark.parametrize(("masked", "synchronized"), [(False, False), (True, True)])
    @pytest.mark.parametrize("kind", KINDS)
    @needs_devices
    def test_checked_and_unchecked_are_the_same(self, kind, masked, synchronized):
        norm = partial(bnjax.BatchNorm, axis_name="d" if synchronized else None, **KINDS[kind])
        model = Masked(norm) if masked else models.MLP((8, 8), 3, norm_of(norm))
        state = training.create_state(model, optax.sgd(0.1), KEY, normal(4, 6))
        mesh = Mesh(jax.devices()[:4], ("d",))
        checked, unchecked = (
            jax.shard_map(
                self.steps, mesh=mesh, in_specs=(P(), P("d")), out_specs=P(), check_vma=check
            )(state, examples(64))
            for check in (True, False)
        )
        assert_close(checked, unchecked, 1e-5)

    @needs_devices
    def test_the_update_is_that_of_the_mean_gradient(self):
        batch, state = examples(32), make_state(norm=None)
        mesh = Mesh(jax.devices()[:4], ("d",))
        step = partial(training.train_step, axis_name="d")
        spread = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
        assert_close(spread(state, batch)[0].params, training.train_step(state, batch)[0].params)

    @pytest.mark.parametrize("name", ["gradient_norms", "backpropagated_norms"])
    @needs_devices
    def test_diagnostics_are_of_each_devices_own_batch(self, name):
        batch, variables = examples(32), make_state().variables
        look = partial(getattr(diagnostics, name), models.MLP((8, 8), 3))
        mesh = Mesh(jax.devices()[:4], ("d",))
        spread = jax.shard_map(
            lambda variables, batch: jax.tree.map(lambda a: a[None], look(variables, batch)),
            mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"),
        )  # fmt: skip
        first = jax.tree.map(lambda a: a[:8], batch)
        own = jax.tree.map(lambda a: a[0], spread(variables, batch))
        assert_close(own, look(variables, first))

    @pytest.mark.parametrize("kind", KINDS)
    def test_is_traced_without_devices(self, kind):
        """The types that `shard_map` checks are known before there is anything to compute on."""
        state = make_state(partial(bnjax.BatchNorm, **KINDS[kind]))
        spread = jax.shard_map(
            self.steps, mesh=AbstractMesh((4,), ("d",)), in_specs=(P(), P("d")), out_specs=P()
        )
        once, *_ = jax.eval_shape(spread, state, examples(64))
        assert jax.tree.structure(once.params) == jax.tree.structure(state.params)


@pytest.mark.usefixtures("strict_promotion")
class TestStrictPromotion:
    @pytest.mark.parametrize(
        ("kind", "images", "labels"),
        [
            *(
                pytest.param(kind, np.uint8, np.int32, marks=pytest.mark.slow)
                for kind in KINDS
                if kind != "all"
            ),
            *(("all", images, np.uint8) for images in (np.uint8, np.float32)),
        ],
    )
    def test_from_the_layer_to_the_epoch(self, kind, images, labels):
        state = make_state(partial(bnjax.BatchNorm, **KINDS[kind]), optax.adam(1e-3))
        batch = Batch(normal(16, 6).astype(images), (np.arange(16) % 3).astype(labels))
        state, metrics = training.train_step(state, batch)
        state, _ = training.train_epoch(state, batch, KEY, batch_size=8)
        assert int(training.evaluate(state, batch, batch_size=5).examples) == 16
        assert np.isfinite(metrics.loss)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
    @pytest.mark.parametrize("scalar", [np.float32, np.float64, jnp.asarray])
    @pytest.mark.usefixtures("x64")
    def test_settings_do_not_widen_the_statistics(self, dtype, scalar):
        x, stats = normal(8, 6).astype(dtype), BatchStats(np.zeros(6, "f"), np.ones(6, "f"))
        settings = {"momentum": scalar(0.9), "epsilon": scalar(1e-5)}
        y, after = functional.batch_norm_train(x, None, None, stats, **settings)
        assert y.dtype == dtype
        assert after.mean.dtype == after.var.dtype == (dtype if dtype == np.float64 else np.float32)
        assert functional.batch_norm_eval(x, None, None, stats, epsilon=scalar(0.1)).dtype == dtype


class TestNumPy:
    """NumPy's arrays do wherever arrays do, and give the same numbers."""

    def test_every_argument(self):
        x, mask, ones = normal(6, 3), np.arange(6) > 1, np.ones(3, np.float32)
        stats = BatchStats(0 * ones, ones, np.int32(2))
        for to in (np.asarray, jnp.asarray):
            given = jax.tree.map(to, (x, 2 * ones, ones, stats))
            train = partial(functional.batch_norm_train, mask=to(mask), momentum=None)
            found = (
                train(*given),
                functional.batch_norm_eval(*given),
                functional.fold(*given[:3], ones, given[3]),
                bnjax.variants.virtual_batches(train, 3)(*given[:4]),
                losses.cross_entropy(to(x), to(np.array([0, 1, 2, 0, 1, 2]))),
            )
            if to is np.asarray:
                expected = found
        assert_close(found, expected, 1e-7)

    @pytest.mark.parametrize("to", [np.asarray, jnp.asarray])
    @pytest.mark.parametrize(
        "shape", [(6, 1, 1, 1), (1, 4, 4, 1), (6, 4, 1, 1), (6, 4, 4, 1), (6, 4, 4)]
    )
    def test_masks_that_flax_takes(self, shape, to):
        x, mask = normal(6, 4, 4, 3), np.random.default_rng(2).random(shape) < 0.6
        layer = bnjax.BatchNorm(use_running_average=False, momentum=0.0)
        theirs = nn.BatchNorm(use_running_average=False, momentum=0.0, use_fast_variance=False)
        variables = layer.init(KEY, x)
        y, updates = layer.apply(variables, to(x), mask=to(mask), mutable=["batch_stats"])
        wide = mask if mask.ndim == 4 else mask[..., None]
        expected, theirs = theirs.apply(variables, x, mask=wide, mutable=["batch_stats"])
        counted = np.broadcast_to(wide, x.shape)
        np.testing.assert_allclose(y[counted], expected[counted], rtol=1e-5, atol=1e-5)
        assert (y[~counted] == 0).all()
        assert_close(updates, theirs)

    def test_a_mask_of_features_is_refused(self):
        layer = bnjax.BatchNorm(use_running_average=False)
        with pytest.raises(
            ValueError, match=r"mask has shape \(6, 3\).* one value for every sample"
        ):
            layer.init(KEY, normal(6, 3), mask=np.ones((6, 3), bool))


class TestContainers:
    """Variables may lie in FrozenDicts, and statistics that are lacking are named."""

    def test_frozen_variables_go_wherever_variables_go(self):
        model = models.MLP((8, 8), 3)
        plain = model.init(KEY, normal(4, 6), train=True)
        frozen, batch = freeze(plain), examples()

        def run(variables):
            state = make_state().replace(**variables)
            state = state.replace(opt_state=state.tx.init(state.params))
            state, _ = training.train_epoch(state, batch, KEY, batch_size=8)
            assert isinstance(state.batch_stats, type(variables["batch_stats"]))
            folded, merged = models.fold_batch_norm(model, variables)
            return (
                state.variables,
                folded.apply(merged, batch.images, train=False),
                population.estimate(model, variables, [batch.images])["batch_stats"],
                torch_interop.to_torch(variables),
                diagnostics.gradient_norms(model, variables, batch),
            )

        assert_close(run(frozen), run(plain), 0)

    @pytest.mark.parametrize(
        ("lost", "told"),
        [
            (("BatchNorm_0", "count"), "lack BatchNorm_0/count, which"),
            (("BatchNorm_1", "var"), "lack BatchNorm_1/var, which"),
            (("BatchNorm_1",), "lack BatchNorm_1/count, BatchNorm_1/mean, BatchNorm_1/var, which"),
        ],
    )
    def test_lacking_statistics_are_named(self, lost, told):
        state = make_state(partial(bnjax.BatchNorm, momentum=None))
        stats = jax.tree.map(lambda a: a, state.batch_stats)
        place = stats
        for key in lost[:-1]:
            place = place[key]
        del place[lost[-1]]
        state = state.replace(batch_stats=stats)
        for train in (
            partial(training.train_step, state, examples()),
            partial(training.train_epoch, state, examples(), KEY, batch_size=8),
        ):
            with pytest.raises(ValueError, match=told):
                train()

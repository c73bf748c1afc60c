from functools import partial
from types import SimpleNamespace

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from bnjax import diagnostics, models, training
from bnjax.losses import sum_metrics
from bnjax.training import Batch

KEY = jax.random.key(0)


def examples(count, seed=0):
    rng = np.random.default_rng(seed)
    images = jnp.asarray(rng.integers(0, 256, (count, 4, 4)), jnp.uint8)
    return Batch(images, jnp.asarray(rng.integers(0, 10, count), jnp.int32))


def fresh_state(use_batch_norm=True, optimizer=None, dropout_rate=0.0):
    model = models.MLP((8,), 10, "batch" if use_batch_norm else None, dropout_rate=dropout_rate)
    return training.create_state(model, optimizer or optax.sgd(0.1), KEY, examples(2).images)


def plain_metrics(state, batch, train):
    """Cross entropy sum and number correct, in float64 NumPy from the logits."""
    logits = state.apply_fn(
        state.variables, batch.images / 255, train=train, mutable=["batch_stats"]
    )[0]
    logits = np.asarray(logits, np.float64)
    own = logits[np.arange(len(logits)), batch.labels]
    losses = np.log(np.exp(logits).sum(axis=1)) - own
    return losses.sum(), (logits.argmax(axis=1) == np.asarray(batch.labels)).sum()


def record(state, batch):
    """A step that only writes down which examples it saw."""
    return state + 1, batch.labels


class StepsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(True, False)
    def test_train_step_follows_the_gradient_of_the_mean_loss(self, use_batch_norm):
        state, batch = fresh_state(use_batch_norm), examples(12)
        after, metrics = self.variant(training.train_step)(state, batch)

        def loss(params):
            variables = {**state.variables, "params": params}
            logits, _ = state.apply_fn(
                variables, batch.images / 255, train=True, mutable=["batch_stats"]
            )
            one_hot = jax.nn.one_hot(batch.labels, 10)
            return -jnp.mean(jnp.sum(one_hot * jax.nn.log_softmax(logits), axis=1))

        value, gradients = jax.value_and_grad(loss)(state.params)
        expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradients)
        chex.assert_trees_all_close(after.params, expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(metrics.loss / metrics.examples, value, rtol=1e-6)
        assert int(after.step) == 1
        assert bool(after.batch_stats) == use_batch_norm
        if use_batch_norm:
            moved = after.batch_stats["BatchNorm_0"]["mean"]
            assert abs(moved).min() > 0

    @chex.variants(with_jit=True, without_jit=True)
    def test_steps_count_losses_and_correct_predictions(self):
        state, batch = fresh_state(), examples(200)
        for step, train in ((training.eval_step, False), (training.train_step, True)):
            result = self.variant(step)(state, batch)
            metrics = result[1] if train else result
            loss, correct = plain_metrics(state, batch, train)
            np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
            assert (int(metrics.correct), int(metrics.examples)) == (correct, 200)


@pytest.mark.parametrize(
    ("logits", "label", "correct"),
    [
        ([1.0, 3.0, 2.0], 1, 1),
        ([1.0, 3.0, 2.0], 2, 0),
        ([3.0, 3.0, 2.0], 0, 1),
        ([3.0, 3.0, 2.0], 1, 0),
        ([np.nan, 3.0, 2.0], 1, 0),
        ([1.0, np.nan, 2.0], 1, 0),
        ([1.0, -np.inf, 2.0], 2, 1),
    ],
)
def test_correct_means_the_first_largest_logit(logits, label, correct):
    def apply_fn(variables, images, train):
        return images

    state = training.TrainState.create(
        apply_fn=apply_fn, params={}, tx=optax.sgd(1), batch_stats={}
    )
    batch = Batch(jnp.array([logits]), jnp.array([label]))
    assert int(training.eval_step(state, batch).correct) == correct


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("count", "batch_size"), [(12, 4), (13, 4), (14, 4), (5, 5)])
def test_an_epoch_visits_every_example_once(count, batch_size, drop_last):
    data = Batch(jnp.zeros((count, 1)), jnp.arange(count))
    seen = []

    def step(state, batch):
        jax.debug.callback(lambda labels: seen.append(np.asarray(labels)), batch.labels)
        return state + 1, batch.labels.sum()

    state, metrics = training.train_epoch(
        jnp.array(0), data, KEY, batch_size=batch_size, drop_last=drop_last, step=step
    )
    jax.effects_barrier()
    whole, rest = divmod(count, batch_size)
    steps = whole + (rest > 0 and not drop_last)
    assert int(state) == steps == len(metrics)
    visited = np.concatenate(seen)
    assert len(np.unique(visited)) == len(visited)
    assert len(visited) == (whole * batch_size if drop_last else count)
    assert sorted(len(labels) for labels in seen)[0] == (
        rest if rest and not drop_last else batch_size
    )


def test_the_key_alone_decides_the_order():
    data = Batch(jnp.zeros((20, 1)), jnp.arange(20))
    run = partial(training.train_epoch, jnp.array(0), data, batch_size=5, step=record)
    first, again, other = (run(jax.random.key(k))[1] for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first.ravel() != jnp.arange(20)).any()


def test_an_epoch_is_its_steps_one_after_the_other():
    data, state = examples(22), fresh_state(optimizer=optax.adam(1e-2))
    after, metrics = training.train_epoch(state, data, KEY, batch_size=8, drop_last=False)
    order = np.argsort(jax.random.bits(KEY, (22,), jnp.uint32))
    losses = []
    for index in (order[:8], order[8:16], order[16:]):
        state, step = training.train_step(state, Batch(data.images[index], data.labels[index]))
        losses.append(step.loss)
    chex.assert_trees_all_close(after.params, state.params, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics.loss, losses, rtol=1e-5)
    np.testing.assert_array_equal(metrics.examples, [8, 8, 6])


def test_running_statistics_keep_the_dtype_that_the_state_has():
    state, data = fresh_state(), examples(40)
    stats = jax.tree.map(lambda a: a.astype(jnp.bfloat16), state.batch_stats)
    half, _ = training.train_epoch(state.replace(batch_stats=stats), data, KEY, batch_size=8)
    full, _ = training.train_epoch(state, data, KEY, batch_size=8)
    for a, b in zip(*(jax.tree.leaves(s.batch_stats) for s in (half, full)), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(np.float32), b, rtol=0.03, atol=0.01)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 100, 1000])
def test_evaluation_covers_every_example_once(batch_size):
    state, data = fresh_state(), examples(100)
    metrics = training.evaluate(state, data, batch_size=batch_size)
    loss, correct = plain_metrics(state, data, train=False)
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
    assert (int(metrics.correct), int(metrics.examples)) == (correct, 100)


def test_evaluation_is_compiled_once():
    state, data = fresh_state(), examples(130)
    evaluate = jax.jit(chex.assert_max_traces(lambda *a: training.evaluate(*a, batch_size=50), n=1))
    first = evaluate(state, data)
    state, _ = training.train_step(state, data)
    assert evaluate(state, data).loss != first.loss


@pytest.mark.parametrize("dropout_rate", [0.0, 0.5])
def test_key_and_step_decide_what_is_dropped(dropout_rate):
    state, batch = fresh_state(dropout_rate=dropout_rate), examples(12)
    other_key = jax.random.key_data(jax.random.key(1))
    changes = ({}, {}, {"step": state.step + 1}, {"dropout_key": other_key})
    first, again, *others = (
        training.train_step(state.replace(**change), batch)[0].params for change in changes
    )
    chex.assert_trees_all_equal(first, again)
    for other in others:
        same = jnp.array_equal(first["Dense_1"]["kernel"], other["Dense_1"]["kernel"])
        assert same == (dropout_rate == 0)


def test_without_dropout_no_key_is_needed():
    state, batch = fresh_state(), examples(12)
    after, _ = training.train_step(state, batch)
    without_key, _ = training.train_step(state.replace(dropout_key=None), batch)
    chex.assert_trees_all_equal(without_key.params, after.params)
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        training.train_step(fresh_state(dropout_rate=0.5).replace(dropout_key=None), batch)


def test_training_reduces_the_loss():
    state, data = fresh_state(optimizer=optax.adam(1e-2)), examples(50)
    before = training.evaluate(state, data).loss
    for epoch in range(20):
        state, _ = training.train_epoch(state, data, jax.random.key(epoch), batch_size=10)
    assert training.evaluate(state, data).loss < 0.7 * before


@pytest.mark.parametrize(
    "images", [np.array([[0, 255]], np.uint8), np.array([[0.0, 1.0]], np.float32)]
)
def test_bytes_become_unit_interval_and_floats_stay(images):
    converted = training.to_float(jnp.asarray(images))
    assert converted.dtype == jnp.float32
    np.testing.assert_array_equal(converted, [[0.0, 1.0]])


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_of_any_kind(impl):
    model = models.MLP((8,), 10, dropout_rate=0.5)
    batch = examples(8)
    state = training.create_state(model, optax.sgd(0.1), jax.random.key(0, impl=impl), batch.images)
    state, metrics = training.train_step(state, batch)
    assert jnp.isfinite(metrics.loss)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_makes_the_loss_nan(label):
    metrics = sum_metrics(jnp.zeros((2, 3)), jnp.array([0, label]))
    assert jnp.isnan(metrics.loss)


def test_losses_of_bfloat16_logits_are_summed_in_float32():
    metrics = sum_metrics(jnp.zeros((3000, 10), jnp.bfloat16), jnp.zeros(3000, jnp.int32))
    np.testing.assert_allclose(metrics.loss, 3000 * np.log(10), rtol=1e-5)


@pytest.mark.parametrize(
    "use",
    [
        lambda batch: training.to_float(batch.images),
        lambda batch: training.create_state(
            models.MLP((8,), 10), optax.sgd(0.1), KEY, batch.images
        ),
        lambda batch: training.train_step(fresh_state(), batch),
        lambda batch: training.train_epoch(fresh_state(), batch, KEY, batch_size=2),
        lambda batch: training.eval_step(fresh_state(), batch),
        lambda batch: training.evaluate(fresh_state(), batch),
        lambda batch: diagnostics.features(models.MLP((8,), 10), fresh_state().variables, batch),
    ],
)
@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint16, bool, np.complex64])
def test_images_are_bytes_or_floating_point(use, dtype):
    """Other integers would pass unscaled, and a network trained on them would be at chance."""
    told = rf"images are {np.dtype(dtype).name[:3]}.*, 4, 4\]: expected an array of uint8"
    with pytest.raises(ValueError, match=told):
        use(examples(4)._replace(images=np.ones((4, 4, 4), dtype)))


@pytest.mark.parametrize(
    "images", [[[0, 255]], {"image": 1}, None, SimpleNamespace(dtype=object(), shape=(4,))]
)
def test_images_that_are_no_array_are_refused(images):
    with pytest.raises(ValueError, match=rf"images are a {type(images).__name__}: .* uint8"):
        training.to_float(images)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [-1, 0, 11, 1000])
def test_a_batch_size_that_the_examples_do_not_fill_is_refused(batch_size, drop_last):
    epoch = partial(training.train_epoch, fresh_state(), examples(10), KEY, drop_last=drop_last)
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}: expected 1 to 10"):
        epoch(batch_size=batch_size)
    if batch_size < 1:
        with pytest.raises(ValueError, match=f"batch_size is {batch_size}: expected at least 1"):
            training.evaluate(fresh_state(), examples(10), batch_size=batch_size)


@pytest.mark.parametrize("labels", [8, 12])
def test_as_many_images_as_labels_are_needed(labels):
    """Indices beyond the images would be clamped without a word."""
    batch = Batch(examples(10).images, examples(labels).labels)
    for use in (
        partial(training.train_epoch, fresh_state(), batch, KEY, batch_size=4),
        partial(training.evaluate, fresh_state(), batch, batch_size=4),
    ):
        with pytest.raises(ValueError, match=f"10 images and {labels} labels"):
            use()
    with pytest.raises(ValueError, match=rf"labels are int32\[{labels}\] and logits .*\(10, 10\)"):
        training.train_step(fresh_state(), batch)


@pytest.mark.parametrize("labels", [np.eye(10)[:4], np.array([0.5, 1, 2, 3]), np.array([[1]] * 4)])
def test_labels_are_integers_one_for_each_example(labels):
    with pytest.raises(ValueError, match=r"expected integers \[N\] and logits \[N, classes\]"):
        training.train_step(fresh_state(), Batch(examples(4).images, labels))


def test_labels_of_two_classes_may_be_boolean():
    batch = examples(6)
    metrics = training.eval_step(fresh_state(), batch._replace(labels=batch.labels > 4))
    expected = training.eval_step(fresh_state(), batch._replace(labels=(batch.labels > 4) * 1))
    chex.assert_trees_all_equal(metrics, expected)

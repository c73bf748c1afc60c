"""What the diagnostics see in both networks, kept in files from which the page is drawn."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bnjax import diagnostics, models, population
from bnjax.paired import Arm, Lane, States
from bnjax.parallel import processes
from bnjax.training import Batch, to_float
from experiments.lab import metrics

# So many training examples are looked at; a fixed sample shows what changes between epochs.
SAMPLE = 500
PERCENTILES = (5.0, 25.0, 50.0, 75.0, 95.0)
BINS = 60

# The population's statistics are taken over so many training examples at a time, or some more.
CHUNK = 5000

# So many test examples are kept that one network alone gets right, of each.
KEPT = 16


def after_epoch(
    lanes: Sequence[Lane], states: States, example: Batch, train: Batch
) -> dict[str, np.ndarray]:
    """What an epoch left, for each arm and replicate.

    Args:
        lanes: the arms and where they live.
        states: of all arms.
        example: one test example.
        train: the training set, whose first examples are the sample.

    Returns:
        `{arm/name: [R, ...]}`, of D hidden layers: `features_k` `[R, 1, H]` of the example; of the
        sample `gradient_norms` `[R, D + 1]` of the kernels, `percentiles` `[R, D, P]` and
        `histograms` `[R, D, BINS]` with `edges` `[R, D, BINS + 1]` of all values that enter the
        activations.
    """
    sample = jax.tree.map(lambda a: a[:SAMPLE], train)
    return {
        f"{arm.name}/{name}": processes.gather(values)
        for lane in lanes
        for arm in lane.arms
        for name, values in _look(arm.module, states[arm.name].variables, example, sample).items()
    }


@partial(jax.jit, static_argnames="module")
def _look(
    module: models.MLP, variables: Any, example: Batch, sample: Batch
) -> dict[str, jax.Array]:
    def look(variables: Any) -> dict[str, jax.Array]:
        entering = diagnostics.preactivations(module, variables, sample).values()
        norms = diagnostics.gradient_norms(module, variables, sample)
        counts, edges = zip(*(jnp.histogram(values, BINS) for values in entering), strict=True)
        return {
            **diagnostics.features(module, variables, example),
            "gradient_norms": jnp.stack([norms[f"Dense_{k}"] for k in range(len(norms))]),
            "percentiles": jnp.stack(
                [jnp.percentile(values, jnp.array(PERCENTILES)) for values in entering]
            ),
            "histograms": jnp.stack(counts),
            "edges": jnp.stack(edges),
        }

    return jax.lax.map(look, variables)


def at_end(
    lanes: Sequence[Lane], states: States, replicate: int, train: Batch, test: Batch
) -> dict[str, np.ndarray]:
    """What a replicate of each arm makes of the test set, and what it normalizes by.

    Args:
        lanes: the arms and where they live.
        states: of all arms.
        replicate: which one.
        train: the training set.
        test: the test set.

    Returns:
        `labels` `[N]` and `{arm}/predictions` `[N]`; `only_{arm}` `[K]`, the places of the first
        test examples that this arm alone gets right, and `images_{arm}` `[K, 28, 28]`; and for each
        batch normalization `running/{layer}/mean`, `population/{layer}/mean` `[H]`, and `var`.
    """
    arms = [arm for lane in lanes for arm in lane.arms]
    chosen = {
        arm.name: jax.tree.map(lambda a: a[replicate], processes.gather(states[arm.name].variables))
        for arm in arms
    }
    predictions = {arm.name: _predict(arm.module, chosen[arm.name], test) for arm in arms}
    found: dict[str, np.ndarray] = {"labels": np.asarray(test.labels, np.uint8)}
    for arm in arms:
        right = {name: guess == test.labels for name, guess in predictions.items()}
        alone = right.pop(arm.name) & ~np.any(list(right.values()), axis=0)
        places = np.flatnonzero(alone)[:KEPT]
        found[f"{arm.name}/predictions"] = predictions[arm.name]
        found[f"only_{arm.name}"] = places
        found[f"images_{arm.name}"] = np.asarray(test.images)[places]
        if chosen[arm.name].get("batch_stats"):
            found |= _statistics(arm, chosen[arm.name], train)
    return found


def end_is_missing(path: Path) -> bool:
    """Whether a run lacks what `at_end` sees, though a replicate was finite to the end."""
    if (path / "probes" / "end.npz").exists():
        return False
    lines = metrics.read(path)
    return bool(lines) and metrics.finite_to_the_end(lines) is not None


def _predict(module: nn.Module, variables: Any, test: Batch) -> np.ndarray:
    @jax.jit
    def predict(images: jax.Array) -> jax.Array:
        def one(image: jax.Array) -> jax.Array:
            return module.apply(variables, to_float(image)[None], train=False)[0].argmax()

        return jax.lax.map(one, images, batch_size=1000)

    return np.asarray(predict(test.images)).astype(np.uint16)


def _statistics(arm: Arm, variables: Any, train: Batch) -> dict[str, np.ndarray]:
    batches = np.array_split(train.images, max(1, len(train.images) // CHUNK))
    estimated = population.estimate(arm.module, variables, batches)
    return {
        f"{kind}/{layer}/{name}": np.asarray(values)
        for kind, one in (("running", variables), ("population", estimated))
        for layer, statistics in one["batch_stats"].items()
        for name, values in statistics.items()
    }

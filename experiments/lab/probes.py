"""What the diagnostics see in all networks, kept in files from which the page is drawn."""

import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from bnjax import diagnostics, population
from bnjax.paired import States, Trainer
from bnjax.parallel import processes
from bnjax.training import Batch, to_float
from experiments.lab.scratch import head

# So many training examples are looked at; a fixed sample shows what changes between epochs.
SAMPLE = 500
PERCENTILES = (5.0, 25.0, 50.0, 75.0, 95.0)
BINS = 60

# The population's statistics are taken over so many training examples at a time, or some more.
CHUNK = 5000

# So many test examples are kept that one network alone gets right, of each.
KEPT = 16


def after_epoch(trainer: Trainer, states: States, example: Batch) -> dict[str, np.ndarray]:
    """What an epoch left, for each arm and replicate.

    Returns:
        `{arm/name: [R, ...]}`, of D hidden layers: `features_k` `[R, 1, ...]` of the example; of
        the first training examples `gradient_norms` `[R, L]` of the kernels, `percentiles`
        `[R, D, P]` and `histograms` `[R, D, BINS]` with `edges` `[R, D, BINS + 1]` of all values
        that enter the activations.
    """
    sample = head(trainer.train, SAMPLE)
    return {
        f"{name}/{what}": processes.gather(values)
        for name, arm in trainer.arms.items()
        for what, values in _inspect(arm.module, states[name].variables, example, sample).items()
    }


@partial(jax.jit, static_argnames="module")
def _inspect(
    module: nn.Module, variables: Any, example: Batch, sample: Batch
) -> dict[str, jax.Array]:
    def inspect(variables: Any) -> dict[str, jax.Array]:
        entering = diagnostics.preactivations(module, variables, sample).values()
        norms = diagnostics.gradient_norms(module, variables, sample)
        counts, edges = zip(*(jnp.histogram(values, BINS) for values in entering), strict=True)
        return {
            **diagnostics.features(module, variables, example),
            "gradient_norms": jnp.stack(list(norms.values())),
            "percentiles": jnp.stack([jnp.percentile(x, jnp.array(PERCENTILES)) for x in entering]),
            "histograms": jnp.stack(counts),
            "edges": jnp.stack(edges),
        }

    return jax.lax.map(inspect, variables)


def at_end(trainer: Trainer, states: States, replicate: int) -> dict[str, np.ndarray]:
    """What a replicate of each arm makes of the test set, and what it normalizes by.

    Returns:
        `labels` `[N]` and `{arm}/predictions` `[N]`; `only_{arm}` `[K]`, the places of the first
        test examples that this arm alone gets right, and `images_{arm}` `[K, ...]`; and for each
        layer with a running mean and variance `{arm}/running/{layer}/mean`,
        `{arm}/population/{layer}/mean` `[H]`, and `var`.
    """
    test, found, right = trainer.test, {"labels": np.asarray(trainer.test.labels)}, {}
    for name, arm in trainer.arms.items():
        stacked = processes.gather(states[name].variables)
        variables = jax.tree.map(lambda a: a[replicate], stacked)
        found[f"{name}/predictions"] = predictions = _predict(arm.module, variables, test)
        right[name] = predictions == test.labels
        for what, values in _statistics(arm.module, variables, trainer.train.images).items():
            found[f"{name}/{what}"] = values
    alone = np.sum(list(right.values()), axis=0) == 1
    for name, by_name in right.items():
        found[f"only_{name}"] = places = np.flatnonzero(by_name & alone)[:KEPT]
        found[f"images_{name}"] = np.asarray(test.images)[places]
    return found


def _predict(module: nn.Module, variables: Any, test: Batch) -> np.ndarray:
    def predict(image: jax.Array) -> jax.Array:
        return module.apply(variables, to_float(image)[None], train=False)[0].argmax()

    classes = jax.jit(partial(jax.lax.map, predict, batch_size=1000))(test.images)
    return np.asarray(classes).astype(np.uint16)


def _statistics(module: nn.Module, variables: Any, images: Any) -> Mapping[str, np.ndarray]:
    paths = population.layer_paths(module, variables, images[:2])
    if not paths:
        return {}
    batches = np.array_split(images, max(1, len(images) // CHUNK))
    kinds = {"running": variables, "population": population.estimate(module, variables, batches)}
    stats = {kind: flatten_dict(of_kind["batch_stats"]) for kind, of_kind in kinds.items()}
    return {
        f"{kind}/{'/'.join(path)}/{name}": np.asarray(stats[kind][*path, name])
        for kind, path, name in itertools.product(kinds, paths, ("mean", "var"))
    }

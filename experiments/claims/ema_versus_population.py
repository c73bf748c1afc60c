"""How running statistics are biased, and how many samples the population's need."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bnjax import paired, population, training
from bnjax.functional import BatchStats, batch_norm_train
from bnjax.training import Batch, TrainState
from experiments.claims import Check, Claim, Evidence, Settings, collect, draw_lines
from experiments.lab.arms import make_arms
from experiments.lab.presets import BOOSTCOURSE
from experiments.lab.scratch import train, unstack

MOMENTUM, BATCH, BATCHES, STREAMS, EARLY = 0.9, 16, 150, 500, 10
SAMPLES = (10, 30, 100, 300, 1000, 10_000, 60_000)
KINDS = {"estimated": "re-estimated statistics", "running": "running statistics"}


def run(settings: Settings) -> Evidence:
    """Biases over frozen weights, and accuracy by the number of samples."""
    arm = make_arms(BOOSTCOURSE)[0]
    keys = settings.keys(4, 10)
    examples, test = (jax.tree.map(jnp.asarray, batch) for batch in settings.data())
    epochs = settings.either(2, BOOSTCOURSE.epochs)
    *_, last = train([arm], keys, examples, test, epochs=epochs, batch_size=BOOSTCOURSE.batch_size)
    pairs = zip(unstack(last.states["bn"]), keys, strict=True)
    found = [_look(*pair, arm.module, examples, test) for pair in pairs]
    bias, startup, running, estimated = map(np.array, zip(*found, strict=True))
    few, some, many = (estimated[:, SAMPLES.index(count)] for count in (10, 1000, SAMPLES[-1]))
    values = (bias, startup, few - many, some - many, running - many)
    lines = {"estimated": estimated, "running": np.tile(running[:, None], len(SAMPLES))}
    panels = {"Test accuracy in percent": lines}
    return collect(CLAIM.checks, values, panels, SAMPLES)


def _look(
    state: TrainState, key: Array, model: nn.Module, examples: Batch, test: Batch
) -> tuple[Array, Array, float, list[float]]:
    """Both biases, and accuracy with running statistics and with those of so many `SAMPLES`."""
    dense = state.params["Dense_0"]
    pixels = training.to_float(examples.images[:10_000])
    x = pixels.reshape(len(pixels), -1) @ dense["kernel"]
    bias, startup = _biases(x, paired.derive(key, "streams"))
    images = jax.random.permutation(paired.derive(key, "samples"), examples.images)

    def accuracy(variables: dict[str, Any]) -> float:
        metrics = training.evaluate(state.replace(batch_stats=variables["batch_stats"]), test)
        return 100 * int(metrics.correct) / int(metrics.examples)

    def estimate(count: int) -> dict[str, Any]:
        some = images[:count]
        batches = [some[k : k + 1000] for k in range(0, len(some), 1000)]
        whole = [batch for batch in batches if len(batch) > 1]
        return population.estimate(model, state.variables, whole)

    return bias, startup, accuracy(state.variables), [accuracy(estimate(n)) for n in SAMPLES]


@jax.jit
def _biases(x: Array, key: Array) -> tuple[Array, Array]:
    """What the running variance lacks and what its start adds, over streams from `x`, `[N, H]`.

    Returns:
        m (1 - E[running variance] / population variance) after many batches, expected to be 1; and
        (E[running variance after t batches] - its limit) / (1 - its limit) / momentum^t, as well.
    """
    x = x - x.mean(axis=0, keepdims=True)
    fresh = BatchStats(jnp.zeros(x.shape[1]), jnp.ones(x.shape[1]))

    def stream(key: Array) -> Array:
        def step(stats: BatchStats, key: Array) -> tuple[BatchStats, Array]:
            batch = x[jax.random.randint(key, (BATCH,), 0, len(x))]
            _, stats = batch_norm_train(batch, None, None, stats, momentum=MOMENTUM)
            return stats, stats.var

        return lax.scan(step, fresh, jax.random.split(key, BATCHES))[1]

    running = lax.map(stream, jax.random.split(key, STREAMS)).mean(axis=0)  # [batches, H]
    var = x.var(axis=0)
    limit = (1 - 1 / BATCH) * var
    start = 1 - limit
    left = jnp.sum((running[EARLY - 1] - limit) * start) / jnp.sum(start**2)
    late = running[BATCHES // 2 :].mean(axis=0)
    return BATCH * jnp.mean(1 - late / var), left / MOMENTUM**EARLY


CLAIM = Claim(
    id="ema-versus-population",
    statement="A running variance lacks 1/m of the population's and carries momentum^t of its "
    "start; some thousand samples give statistics that evaluate as well as all.",
    source="Ioffe & Szegedy (2015), algorithm 2; Wu & Johnson, Rethinking Batch in BatchNorm "
    "(2021), section 3",
    setup=f"The preset boostcourse (quick: 2 epochs). Over its frozen first layer, {STREAMS} "
    f"streams of {BATCHES} batches of m = {BATCH}, momentum {MOMENTUM}, biased variance; test "
    f"accuracy with statistics re-estimated from {SAMPLES[0]} to {SAMPLES[-1]:,} training images.",
    checks=(
        Check("bias of the running variance times m", "1, in theory", 0.9, 1.1),
        Check(f"start left after {EARLY} batches over momentum^{EARLY}", "1, in theory", 0.9, 1.1),
        Check("accuracy from 10 samples minus from all, points", "below 0", high=0.0),
        Check("accuracy from 1,000 samples minus from all, points", "about 0", -0.5, 0.5),
        Check("accuracy with running statistics minus from all, points", "about 0", -0.5, 0.5),
    ),
    seconds=(18, 40),
    run=run,
    draw=draw_lines(KINDS, xlabel="training images they are estimated from", xscale="log"),
)

"""Batch normalization keeps the features of deep random networks from collapsing."""

import jax
import jax.numpy as jnp
import numpy as np

from bnjax import diagnostics, initializers, models
from bnjax.training import to_float
from experiments.claims import Check, Claim, Evidence, Settings, collect, draw_lines

DEPTH, WIDTH, BATCH = 30, 128, 128


def run(settings: Settings) -> Evidence:
    """Effective rank and cosine similarity by layer."""
    keys = settings.keys(5, 10)
    batch, _ = settings.data(BATCH)

    def measure(norm: str | None) -> dict[str, np.ndarray]:
        model = models.MLP((WIDTH,) * DEPTH, 10, norm, kernel_init=initializers.he_normal)

        @jax.jit
        def probe(key: jax.Array) -> dict[str, jax.Array]:
            variables = model.init(key, to_float(batch.images), train=True)
            layers = diagnostics.features(model, variables, batch, train=True).values()
            measures = (diagnostics.effective_rank, diagnostics.cosine_similarity)
            return {of.__name__: jnp.stack([of(layer) for layer in layers]) for of in measures}

        found = [probe(key) for key in keys]
        return {what: np.array([one[what] for one in found]) for what in found[0]}  # [R, layers]

    by_arm = {"bn": measure("batch"), "no_bn": measure(None)}
    bn, no_bn = (found["effective_rank"][:, -1] for found in by_arm.values())
    cosines = by_arm["no_bn"]["cosine_similarity"][:, -1]
    titles = {"effective_rank": "Effective rank", "cosine_similarity": "Mean cosine of two images"}
    panels = {
        title: {arm: found[what] for arm, found in by_arm.items()} for what, title in titles.items()
    }
    return collect(CLAIM.checks, (bn / np.maximum(no_bn, 1), bn, no_bn, cosines), panels)


CLAIM = Claim(
    id="rank-collapse",
    statement="Without batch normalization the features of a deep random network collapse towards "
    "one direction, whatever the input; with it their rank stays high.",
    source="Daneshmand et al., Batch normalization provably avoids rank collapse (2020), theorem 2",
    setup=f"{DEPTH} hidden layers of {WIDTH}, ReLU, He's initialization, {BATCH} training images. "
    "The effective rank is the number of singular values above 1 % of the largest.",
    checks=(
        Check("effective rank, ratio with BN to without", "grows without bound", low=3.0),
        Check("effective rank with BN", "of the order of the square root of the width"),
        Check("effective rank without BN", "1"),
        Check("cosine of two images without BN", "1"),
    ),
    seconds=(9, 20),
    run=run,
    draw=draw_lines(xlabel="layer, from the input on", ylim=(0, None)),
)

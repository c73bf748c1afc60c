"""Batch normalization keeps the features of deep random networks from collapsing."""

import jax
from matplotlib.figure import Figure

from bnjax import diagnostics, initializers, models, paired
from bnjax.training import to_float
from experiments.claims import STYLES, Check, Claim, Evidence, Settings, measured
from experiments.lab.grids import take
from experiments.report import figures

DEPTH, WIDTH, BATCH = 30, 128, 128
NORMS = {"bn": "batch", "no_bn": None}


def run(settings: Settings) -> Evidence:
    """Effective rank and cosine similarity by layer."""
    keys = paired.replicate_keys(settings.seed, settings.count(5, 10))
    batch = take(settings.train, BATCH)

    def measure(name: str) -> dict[str, list[list[float]]]:
        model = models.MLP((WIDTH,) * DEPTH, 10, NORMS[name], kernel_init=initializers.he_normal)

        @jax.jit
        def probe(key: jax.Array) -> dict[str, jax.Array]:
            variables = model.init(key, to_float(batch.images), train=True)
            looks = (diagnostics.effective_rank, diagnostics.cosine_similarity)
            found = [look(model, variables, batch, train=True) for look in looks]
            return found[0] | found[1]

        found = [probe(key) for key in keys]
        return {what: [one[what].tolist() for one in found] for what in found[0]}

    by_arm = {name: measure(name) for name in NORMS}
    ranks = {name: [layers[-1] for layers in by_arm[name]["effective_rank"]] for name in by_arm}
    ratio = [bn / max(no_bn, 1) for bn, no_bn in zip(ranks["bn"], ranks["no_bn"], strict=True)]
    cosines = [layers[-1] for layers in by_arm["no_bn"]["cosine_similarity"]]
    values = (ratio, ranks["bn"], ranks["no_bn"], cosines)
    return Evidence(measured(CLAIM.checks, values), by_arm)


def draw(evidence: Evidence) -> Figure:
    """Both probes by layer."""
    titles = {"effective_rank": "Effective rank", "cosine_similarity": "Cosine of two images"}
    figure, row = figures.panels(list(titles.values()))
    for axes, what in zip(row, titles, strict=True):
        for name, probes in evidence.picture.items():
            figures.draw_band(axes, STYLES[name], range(1, DEPTH + 1), probes[what])
        axes.set_xlabel("layer, from the input on")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    row[0].set_ylabel(f"singular values above 1 % of the largest, of {BATCH}")
    row[1].set_ylabel("mean over all pairs")
    return figure


CLAIM = Claim(
    id="rank-collapse",
    statement="Without batch normalization the features of a deep random network collapse towards "
    "one direction, whatever the input; with it their rank stays high.",
    source="Daneshmand et al., Batch normalization provably avoids rank collapse (2020), theorem 2",
    setup=f"{DEPTH} hidden layers of {WIDTH}, ReLU, He's initialization, {BATCH} training images.",
    criterion="At depth 30, the mean ratio of the numbers of singular values above 1 % of the "
    "largest, with to without batch normalization, is at least 3.",
    checks=(
        Check("effective rank, ratio with BN to without", "grows without bound", low=3.0),
        Check("effective rank with BN", "of the order of the square root of the width"),
        Check("effective rank without BN", "1"),
        Check("cosine of two images without BN", "1"),
    ),
    seconds=(9, 20),
    run=run,
    draw=draw,
)

"""Gradients that explode set a limit to the depth that batch normalization can train."""

import numpy as np
from matplotlib.figure import Figure

from bnjax import paired
from experiments.claims import LABELS, STYLES, Check, Claim, Evidence, Settings, measured
from experiments.lab.grids import Cell, accuracy, by_cell, epochs_of, he_std, take, train_grid
from experiments.report import figures

DEPTHS = (5, 10, 20, 40)
RATES = (0.001, 0.01, 0.1)
WIDTH = 64


def run(settings: Settings) -> Evidence:
    """The best test accuracy over the learning rates, at each depth."""
    keys = paired.replicate_keys(settings.seed, settings.count(3, 5))
    examples = take(settings.train, settings.either(10_000, 60_000))
    cells = [Cell(rate, he_std) for rate in RATES]

    def measure(depth: int) -> dict[str, np.ndarray]:
        *_, last = train_grid(
            cells,
            keys,
            examples,
            settings.test,
            epochs=epochs_of(settings.either(100, 600), 100, examples),
            batch_size=100,
            hidden_sizes=(WIDTH,) * depth,
        )
        return {arm: by_cell(values, cells) for arm, values in accuracy(last).items()}

    depths = settings.either((DEPTHS[0], DEPTHS[-1]), DEPTHS)
    found = [measure(depth) for depth in depths]
    best = {
        arm: np.array([by_arm[arm].max(axis=0) for by_arm in found])  # [depths, R]
        for arm in LABELS
    }
    values = (best["bn"][-1] - best["bn"][0], best["bn"][-1], best["no_bn"][-1])
    curves = {arm: values.tolist() for arm, values in best.items()}
    return Evidence(measured(CLAIM.checks, values), {"depths": depths, "curves": curves})


def draw(evidence: Evidence) -> Figure:
    """Accuracy by depth."""
    figure, (axes,) = figures.panels(["Best test accuracy over the learning rates"], width=6)
    for arm, values in evidence.picture["curves"].items():
        figures.draw_band(axes, STYLES[arm], evidence.picture["depths"], np.transpose(values))
    axes.set_xlabel("hidden layers")
    axes.set_ylabel("percent")
    axes.set_ylim(0, 100)
    axes.legend(frameon=False)
    return figure


CLAIM = Claim(
    id="depth-limit",
    statement="Batch normalization cannot train networks of arbitrary depth: its exploding "
    "gradients set a limit, beyond which accuracy falls to chance.",
    source="Yang et al., A mean field theory of batch normalization (2019), figure 2 (a)",
    setup=f"Hidden layers of {WIDTH}, ReLU, He's initialization, 600 steps of SGD on batches of "
    f"100 (quick: 100), depths {', '.join(map(str, DEPTHS))}, the best of the learning rates "
    f"{', '.join(f'{rate:g}' for rate in RATES)}. The paper goes to depth 100 and more epochs.",
    criterion=f"With batch normalization, the mean of the best accuracy at depth {DEPTHS[-1]} is "
    f"at least 20 points below that at depth {DEPTHS[0]}.",
    checks=(
        Check(
            f"test accuracy with BN, depth {DEPTHS[-1]} minus {DEPTHS[0]}, points",
            "falls to chance near depth 50",
            high=-20.0,
        ),
        Check(f"test accuracy in %, depth {DEPTHS[-1]}, with BN", ""),
        Check(f"test accuracy in %, depth {DEPTHS[-1]}, without BN", ""),
    ),
    seconds=(50, 120),
    run=run,
    draw=draw,
)

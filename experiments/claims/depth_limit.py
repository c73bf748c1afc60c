"""Gradients that explode set a limit to the depth that batch normalization can train."""

import numpy as np

from experiments.claims import Check, Claim, Evidence, Settings, collect, draw_lines, grids

DEPTHS = (5, 10, 20, 40)
RATES = (0.001, 0.01, 0.1)
WIDTH = 64


def run(settings: Settings) -> Evidence:
    """The best test accuracy over the learning rates, at each depth."""
    keys = settings.keys(3, 5)
    data = settings.data(settings.either(10_000, 60_000))
    epochs = grids.epochs_of(settings.either(100, 600), 100, data[0])
    depths = settings.either((DEPTHS[0], DEPTHS[-1]), DEPTHS)
    points = [grids.GridPoint(rate, lambda fan_in, _: np.sqrt(2 / fan_in)) for rate in RATES]

    def measure(depth: int) -> dict[str, np.ndarray]:
        sizes = (WIDTH,) * depth
        *_, last = grids.train_grid(
            points, keys, *data, epochs=epochs, batch_size=100, hidden_sizes=sizes
        )
        accuracies = grids.accuracy(last).items()
        return {arm: np.max(np.split(values, len(RATES)), axis=0) for arm, values in accuracies}

    best = grids.stack(measure(depth) for depth in depths)  # [R, depths]
    drop = best["bn"][:, -1] - best["bn"][:, 0]
    values = (drop, best["bn"][:, -1], best["no_bn"][:, -1])
    panels = {"Best test accuracy in percent": best}
    return collect(CLAIM.checks, values, panels, depths)


CLAIM = Claim(
    id="depth-limit",
    statement="Batch normalization cannot train networks of arbitrary depth: its exploding "
    "gradients set a limit, beyond which accuracy falls to chance.",
    source="Yang et al., A mean field theory of batch normalization (2019), figure 2 (a)",
    setup=f"Hidden layers of {WIDTH}, ReLU, He's initialization, 600 steps of SGD on batches of "
    f"100 (quick: 100), depths {', '.join(map(str, DEPTHS))}, the best of the learning rates "
    f"{', '.join(f'{rate:g}' for rate in RATES)}. The paper goes to depth 100 and more epochs.",
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
    draw=draw_lines(xlabel="hidden layers", ylim=(0, 100)),
)

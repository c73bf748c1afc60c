"""What a page says of a run, in words computed from its numbers."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from bnjax.statistics import summarize
from experiments.lab.console import format_summary
from experiments.lab.metrics import ARMS, LABELS
from experiments.report import layers, predictions
from experiments.report.figures import Probes

METRIC = "test_accuracy"


def headline(summary: Mapping[str, Any]) -> str:
    """The difference in test accuracy, how often it was so, and how sure it is.

    Args:
        summary: of a run.
    """
    lost = [arm for arm in ARMS if summary["arms"][arm][METRIC]["mean"] is None]
    if len(lost) == len(ARMS):
        return "Both networks diverged in every replicate"
    if lost:
        (left,) = (arm for arm in ARMS if arm not in lost)
        accuracy = format_summary(METRIC, summary["arms"][left][METRIC])
        return (
            f"{_capital(LABELS[lost[0]])} the network diverged in every replicate; "
            f"{LABELS[left]} test accuracy was {accuracy}"
        )
    difference = summary["paired_differences"][METRIC]
    if difference["mean"] is None:
        return "No pair of networks was left to compare: in each one of them diverged"
    points = round(100 * difference["mean"], 1)
    how = "higher" if points >= 0 else "lower"
    told = f"With batch normalization test accuracy was {abs(points):.1f} points {how}"
    if not points:
        told = "With and without batch normalization test accuracy was the same"
    if difference["interval"] is None:
        arms = (format_summary(METRIC, summary["arms"][arm][METRIC]) for arm in ARMS)
        told += f": {' against '.join(arms)}, in one replicate"
    else:
        higher, n = difference["favour"], difference["n"]
        lower = n - higher - difference["ties"]
        count = lower if points < 0 else higher
        low, high = (100 * bound for bound in difference["interval"])
        told += f", {'higher with it ' * (not points)}in {count} of {n} replicates"
        told += f"; 95 % interval {low:+.1f} to {high:+.1f} points"
        if points and low <= 0 <= high:
            told += ", which includes no difference"
    left_out = summary["replicates"] - difference["n"]
    return told + f"; {left_out} left out, in which a network diverged" * bool(left_out)


def losses(summary: Mapping[str, Any]) -> str:
    """The differences in test loss and training cost; empty where no pair is left."""
    told = []
    for metric, name in (("test_loss", "Test loss"), ("train_cost", "training cost")):
        mean = summary["paired_differences"][metric]["mean"]
        if mean is None:
            return ""
        told.append(f"{name} was {abs(mean):.3g} {'higher' if mean > 0 else 'lower'}")
    return f"{told[0]}, {told[1]} with it."


def features(label: int, last: Probes, replicate: int) -> str:
    """What leaves each layer for one test example, for the alt text."""
    told = []
    for arm in ARMS:
        depth = sum(name.startswith(f"{arm}/features_") for name in last)
        values = [last[f"{arm}/features_{k}"][replicate, 0] for k in range(1, depth + 1)]
        zeros = ", ".join(f"{np.mean(one == 0):.0%}" for one in values)
        told.append(f"{LABELS[arm]} {zeros}")
    return (
        f"A test example of class {label} and, as gray images, what leaves each hidden layer, with "
        "batch normalization above and without below. Shares of units that are zero, layer by "
        f"layer: {'; '.join(told)}."
    )


def activations(last: Probes, replicate: int) -> str:
    """How wide the values before the activations spread in the last layer."""
    told = []
    for arm in ARMS:
        low, *_, high = last[f"{arm}/percentiles"][replicate, -1]
        told.append(f"{LABELS[arm]} from {low:.3g} to {high:.3g}")
    return f"After the last epoch nine tenths of them lie, in the last layer, {', '.join(told)}."


def gradients(last: Probes) -> str:
    """The norms of the first and the last kernel's gradient."""
    told = []
    for arm in ARMS:
        norms = last[f"{arm}/gradient_norms"]
        ends = [summarize(norms[:, layer]).mean for layer in (0, -1)]
        first, final = ("not finite" if mean is None else f"{mean:.2g}" for mean in ends)
        told.append(f"{LABELS[arm]} {first} in the first layer, {final} in the last")
    return f"After the last epoch: {'; '.join(told)}."


def statistics(end: Probes) -> str:
    """How far running statistics are from those of the training set."""
    ratios = [
        np.median(end[f"running/{name}/var"] / end[f"population/{name}/var"])
        for name in layers.batch_norms(end)
    ]
    return (
        "The median ratio of running variance to that of the training set is, layer by layer, "
        f"{', '.join(f'{ratio:.3f}' for ratio in ratios)}."
    )


def mistakes(confusions: Mapping[str, np.ndarray]) -> str:
    """How many mistakes each network makes, and which one most often."""
    told = []
    for arm, counts in confusions.items():
        wrong = predictions.off_diagonal(counts)
        label, taken = np.unravel_index(wrong.argmax(), wrong.shape)
        other = "something else" if taken == predictions.CLASSES else taken
        most = f", most often {label} taken for {other} ({wrong.max()} times)" * bool(wrong.any())
        told.append(f"{LABELS[arm]} {wrong.sum()} mistakes{most}")
    return _capital("; ".join(told))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]

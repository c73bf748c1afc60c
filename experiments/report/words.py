"""What a page says of a run, in words computed from its numbers."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.lab.console import format_summary
from experiments.report import layers, predictions
from experiments.report.figures import Probes

METRIC = "test_accuracy"
UNSAID = "without"  # what a sentence that begins with "with" is held against anyway


def phrases(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, str]:
    """Each arm as it stands in a sentence: the first of its two names that begins with "with".

    Example:
        >>> phrases({"a": "with A", "b": "B", "c": "C"}, {"a": "A", "b": "without D", "c": "see"})
        {'a': 'with A', 'b': 'without D', 'c': 'for C'}
    """
    told = {}
    for arm, name in first.items():
        found = [text for text in (name, second[arm]) if text.startswith(("with ", "without "))]
        told[arm] = found[0] if found else f"for {name}"
    return told


def headline(
    summary: Mapping[str, Any], labels: Mapping[str, str], titles: Mapping[str, str]
) -> str:
    """Which arm was best by test accuracy, by how much, how often it was so, and how sure it is.

    Of the summary of a run; `labels` and `titles` are `{arm: label}` and `{arm: title}`.
    """
    short, long = phrases(labels, titles), phrases(titles, labels)
    found = {arm: of_arm[METRIC] for arm, of_arm in summary["arms"].items()}
    accuracy = {arm: format_summary(METRIC, one) for arm, one in found.items()}
    left = [arm for arm, one in found.items() if one["n"]]
    if not left:
        which = {1: "The network", 2: "Both networks"}.get(len(found), "All networks")
        return f"{which} diverged in every replicate"
    if len(left) == 1:
        lost = " and ".join(short[arm] for arm in found if arm not in left)
        told = f"{lost} the network diverged in every replicate; " * bool(lost)
        return _capital(f"{told}{short[left[0]]} test accuracy was {accuracy[left[0]]}")
    # Of those that the reference is held against, the best.
    arm = max(summary["differences"], key=lambda arm: (found[arm]["n"], found[arm]["mean"] or 0))
    reference, replicates = summary["reference"], summary["replicates"]
    difference = summary["differences"][arm][METRIC]
    if len(found) == 2:
        if not difference["n"]:
            return "No pair of networks was left to compare: in each one of them diverged"
        against = UNSAID if titles[reference] == UNSAID else long[reference]
        finals = f": {accuracy[arm]} against {accuracy[reference]}"
        told = _compare(difference, against, replicates, finals)
        return _capital(f"{long[arm]} test accuracy was {told}")
    most = max(one["n"] for one in found.values())
    ranked = [arm for arm, one in found.items() if one["n"] == most]
    highest = accuracy[max(ranked, key=lambda arm: found[arm]["mean"])]
    best = [arm for arm in ranked if accuracy[arm] == highest]
    told = f"Test accuracy was best {' and '.join(long[arm] for arm in best)}, {highest}"
    if difference["n"]:
        told += ": " if best == [arm] else f"; {short[arm]} it was "
        told += _compare(difference, long[reference], replicates)
    lost = ", ".join(
        f"{short[arm]} in {replicates - found[arm]['n']}" for arm in found if arm not in ranked
    )
    return told + f"; not ranked, as they diverged: {lost} of {replicates}" * bool(lost)


def _compare(difference: Mapping[str, Any], against: str, replicates: int, finals: str = "") -> str:
    """How much higher the first is, and how sure that is; of a single pair also the `finals`."""
    points, n, wins = round(100 * difference["mean"], 1), difference["n"], difference["wins"]
    told = f"{abs(points):.1f} points {'higher' if points > 0 else 'lower'}"
    told += f" than {against}" * (against != UNSAID)
    if not points:
        told = f"the same as {against}"
    if difference["interval"] is None:
        told += f"{finals}, in one replicate"
    else:
        count = n - wins - difference["ties"] if points < 0 else wins
        low, high = (100 * bound for bound in difference["interval"])
        told += f", {'higher ' * (not points)}in {count} of {n} replicates"
        told += f"; 95 % interval {low:+.1f} to {high:+.1f} points"
        told += ", which includes no difference" * (bool(points) and low <= 0 <= high)
    return told + f"; {replicates - n} left out, in which a network diverged" * (n < replicates)


def statistics(end: Probes, arm: str) -> str:
    """The median ratio of running variance to that of the training set, layer by layer."""
    ratios = []
    for layer in layers.running_layers(end, arm):
        running, whole = (end[f"{arm}/{of}/{layer}/var"] for of in ("running", "population"))
        varied = whole > 0  # a unit that is dead has no ratio
        ratios.append(f"{np.median(running[varied] / whole[varied]):.3f}" if any(varied) else "-")
    return ", ".join(ratios)


def mistakes(counts: np.ndarray) -> str:
    """How many mistakes a confusion matrix has, and which one most often."""
    wrong = predictions.mistakes(counts)
    label, taken = np.unravel_index(wrong.argmax(), wrong.shape)
    other = "something else" if taken == predictions.CLASSES else taken
    most = f", most often {label} taken for {other} ({wrong.max()} times)" * bool(wrong.any())
    return f"{wrong.sum()} mistakes{most}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]

"""What a page says of a run, in words computed from its numbers.

`names` are what `phrases` makes of labels or titles: `with BN`, `for my norm`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from bnjax.statistics import summarize
from experiments.lab.console import format_summary
from experiments.report import layers, predictions
from experiments.report.figures import Probes, features_of

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

    Args:
        summary: of a run.
        labels: `{arm: label}`.
        titles: `{arm: title}`.
    """
    short, long = phrases(labels, titles), phrases(titles, labels)
    found = {arm: of_arm[METRIC] for arm, of_arm in summary["arms"].items()}
    accuracy = {arm: format_summary(METRIC, one) for arm, one in found.items()}
    left = [arm for arm, one in found.items() if one["n"]]
    if not left:
        which = {1: "The network", 2: "Both networks"}.get(len(found), "All networks")
        return f"{which} diverged in every replicate"
    if len(found) > 2:
        return _capital(_best(summary, accuracy, short, long))
    if len(found) == 1:
        return _capital(f"{long[left[0]]} test accuracy was {accuracy[left[0]]}")
    if len(left) == 1:
        lost = next(arm for arm in found if arm not in left)
        told = f"{short[lost]} the network diverged in every replicate; "
        return _capital(f"{told}{short[left[0]]} test accuracy was {accuracy[left[0]]}")
    reference = summary["reference"]
    ((arm, differences),) = summary["differences"].items()
    difference = differences[METRIC]
    if not difference["n"]:
        return "No pair of networks was left to compare: in each one of them diverged"
    against = "" if titles[reference] == UNSAID else long[reference]
    told = f"{long[arm]} test accuracy was {_compare(difference, against)}"
    if difference["interval"] is None:
        told += f": {accuracy[arm]} against {accuracy[reference]}"
    return _capital(told + _certainty(difference, summary["replicates"]))


def _best(
    summary: Mapping[str, Any],
    accuracy: Mapping[str, str],
    short: Mapping[str, str],
    long: Mapping[str, str],
) -> str:
    """Of more than two arms the best, and how sure it is against the reference."""
    reference, replicates = summary["reference"], summary["replicates"]
    ranked = _rank(summary, METRIC)[::-1]
    best = [arm for arm in ranked if accuracy[arm] == accuracy[ranked[0]]]
    told = f"{' and '.join(long[arm] for arm in best)} test accuracy was best, {accuracy[best[0]]}"
    for arm in [arm for arm in ranked if arm != reference][:1]:
        difference = summary["differences"][arm][METRIC]
        if difference["n"]:
            told += ": " if [arm] == best else f"; {long[arm]} "
            told += _compare(difference, long[reference]) + _certainty(difference, replicates)
    lost = [
        f"{short[arm]} in {replicates - of_arm[METRIC]['n']}"
        for arm, of_arm in summary["arms"].items()
        if arm not in ranked
    ]
    return told + f"; not ranked, as they diverged: {', '.join(lost)} of {replicates}" * bool(lost)


def _rank(summary: Mapping[str, Any], metric: str) -> list[str]:
    """The arms by a metric, the lowest first: those that were finite in the most replicates."""
    found = {arm: of_arm[metric] for arm, of_arm in summary["arms"].items()}
    most = max(one["n"] for one in found.values())
    kept = [arm for arm, one in found.items() if one["n"] == most > 0]
    return sorted(kept, key=lambda arm: found[arm]["mean"])


def _compare(difference: Mapping[str, Any], against: str) -> str:
    points = round(100 * difference["mean"], 1)
    if not points:
        return f"the same as {against or UNSAID}"
    told = f"{abs(points):.1f} points {'higher' if points > 0 else 'lower'}"
    return told + f" than {against}" * bool(against)


def _certainty(difference: Mapping[str, Any], replicates: int) -> str:
    points, n = round(100 * difference["mean"], 1), difference["n"]
    if difference["interval"] is None:
        told = ", in one replicate"
    else:
        higher = difference["wins"]
        count = n - higher - difference["ties"] if points < 0 else higher
        low, high = (100 * bound for bound in difference["interval"])
        told = f", {'higher ' * (not points)}in {count} of {n} replicates"
        told += f"; 95 % interval {low:+.1f} to {high:+.1f} points"
        told += ", which includes no difference" * (bool(points) and low <= 0 <= high)
    left_out = replicates - n
    return told + f"; {left_out} left out, in which a network diverged" * bool(left_out)


def losses(summary: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The differences in test loss and training cost, or which arms have the lowest.

    Empty where no pair is left, or there was none.
    """
    told = []
    for metric, name in (("test_loss", "test loss"), ("train_cost", "training cost")):
        if len(names) > 2 and (ranked := _rank(summary, metric)):
            lowest = summary["arms"][ranked[0]][metric]["mean"]
            told.append(f"{name} was lowest {names[ranked[0]]}, {lowest:.3g}")
        for arm, of_arm in summary["differences"].items():
            mean = of_arm[metric]["mean"]
            if len(names) == 2 and mean is not None:
                it = " with it" * (name == "training cost" and names[arm].startswith("with "))
                told.append(f"{name} was {abs(mean):.3g} {'higher' if mean > 0 else 'lower'}{it}")
    return f"{_capital(', '.join(told))}." if told else ""


def features(last: Probes, names: Mapping[str, str], replicate: int) -> str:
    """How much of what leaves each layer for one test example is zero, layer by layer."""
    told = []
    for arm, name in names.items():
        zeros = [f"{np.mean(one == 0):.0%}" for one in features_of(last, arm, replicate)]
        told.append(f"{name} {', '.join(zeros)}")
    return "; ".join(told)


def activations(last: Probes, names: Mapping[str, str], replicate: int) -> str:
    """Between what values nine tenths of those lie that enter the last activation."""
    found = {name: last[f"{arm}/percentiles"][replicate, -1] for arm, name in names.items()}
    return ", ".join(f"{name} from {of[0]:.3g} to {of[-1]:.3g}" for name, of in found.items())


def choice(last: Probes, names: Mapping[str, str]) -> str:
    """Which layers of deep networks are drawn; empty where all are."""
    depth = max(last[f"{arm}/percentiles"].shape[1] for arm in names)
    shown = [str(layer + 1) for layer in layers.choose_layers(depth)]
    return f" Of {depth} layers {', '.join(shown)} are drawn." * (len(shown) < depth)


def gradients(last: Probes, names: Mapping[str, str]) -> str:
    """The norms of the first and the last kernel's gradient."""
    told = []
    for arm, name in names.items():
        norms = last[f"{arm}/gradient_norms"]
        ends = [summarize(norms[:, layer]).mean for layer in (0, -1)]
        first, final = ("not finite" if mean is None else f"{mean:.2g}" for mean in ends)
        told.append(f"{name} {first} in the first layer, {final} in the last")
    return "; ".join(told)


def statistics(end: Probes, names: Mapping[str, str]) -> str:
    """The median ratio of running variance to that of the training set, layer by layer."""
    told = {}
    for arm, name in names.items():
        ratios = []
        for layer in layers.running_layers(end, arm):
            running, whole = (end[f"{arm}/{of}/{layer}/var"] for of in ("running", "population"))
            varied = whole > 0  # a unit that is dead has no ratio
            ratio = np.median(running[varied] / whole[varied]) if any(varied) else None
            ratios.append("-" if ratio is None else f"{ratio:.3f}")
        if ratios:
            told[name] = ", ".join(ratios)
    if len(told) == 1:
        return "".join(told.values())
    return "; ".join(f"{name} {ratios}" for name, ratios in told.items())


def mistakes(confusions: Mapping[str, np.ndarray], names: Mapping[str, str]) -> str:
    """How many mistakes each network makes, and which one most often."""
    told = []
    for arm, counts in confusions.items():
        wrong = predictions.mistakes(counts)
        label, taken = np.unravel_index(wrong.argmax(), wrong.shape)
        other = "something else" if taken == predictions.CLASSES else taken
        most = f", most often {label} taken for {other} ({wrong.max()} times)" * bool(wrong.any())
        told.append(f"{names[arm]} {wrong.sum()} mistakes{most}")
    return _capital("; ".join(told))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]

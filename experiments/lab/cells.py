"""The cells of a sweep: trained together where only learning rates differ, and what each says."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from bnjax import paired
from bnjax.data import Dataset
from bnjax.paired import Arm, States
from bnjax.statistics import summarize
from bnjax.training import Batch
from experiments.lab import arms, grids, metrics
from experiments.lab.console import SHOWN, format_summary
from experiments.lab.presets import Experiment

METRIC = "test_accuracy"
ADAM = optax.inject_hyperparams(optax.adam)(learning_rate=1.0)


class SweepCell(NamedTuple):
    """One setting, and its metrics after the last epoch: `{arm: {metric: [R]}}`."""

    activation: str
    batch_size: int
    learning_rate: float
    values: dict[str, dict[str, list[float]]]


def train(group: Sequence[Experiment], dataset: Dataset) -> list[SweepCell]:
    """The cells of experiments that differ in the learning rate alone, by one program."""
    first, count = group[0], group[0].replicates
    rates = np.repeat([one.learning_rate for one in group], count).astype(np.float32)

    def change(states: States) -> States:
        return {name: grids.with_rates(state, rates) for name, state in states.items()}

    epochs = grids.train(
        [Arm(arm.name, arm.module, ADAM) for arm in arms.make_arms(first)],
        jnp.tile(paired.replicate_keys(first.seed, count), len(group)),
        Batch(dataset.train_images, dataset.train_labels),
        Batch(dataset.test_images, dataset.test_labels),
        epochs=first.epochs,
        batch_size=first.batch_size,
        drop_last=first.drop_last,
        change=change,
    )
    lines = [line for epoch in epochs for line in metrics.lines_of(epoch, first.arms)]
    curves = metrics.curves(lines, first.arms)
    final = {
        arm: {name: curves[arm][name][-1].reshape(len(group), count) for name in SHOWN}
        for arm in first.arms
    }
    return [
        SweepCell(
            one.activation,
            one.batch_size,
            one.learning_rate,
            {arm: {name: final[arm][name][k].tolist() for name in SHOWN} for arm in first.arms},
        )
        for k, one in enumerate(group)
    ]


class CellResult(NamedTuple):
    """What a cell says of test accuracy.

    Attributes:
        finals: of each arm its summary over the replicates in which it is finite.
        differences: of each arm but the reference minus the reference, where both are finite.
        told: each difference in words, or who diverged.
        best: the arms of the highest mean; none where all diverged, several where they tie.
    """

    finals: dict[str, dict[str, Any]]
    differences: dict[str, dict[str, Any]]
    told: dict[str, str]
    best: list[str]


def summarize_cell(cell: SweepCell, reference: str, labels: Mapping[str, str]) -> CellResult:
    """What each arm is worth in a cell, against the reference."""
    values = {arm: {METRIC: np.array(of_arm[METRIC])} for arm, of_arm in cell.values.items()}
    finals = {arm: summarize(of_arm[METRIC])._asdict() for arm, of_arm in values.items()}
    differences, told = {}, {}
    for arm in (arm for arm in finals if arm != reference):
        found = metrics.difference(METRIC, values[arm], values[reference])
        differences[arm], told[arm] = found, format_summary(METRIC, found, difference=True)
        if not found["n"]:
            lost = [labels[name] for name in (arm, reference) if not finals[name]["n"]]
            told[arm] = f"{lost[0] if len(lost) == 1 else 'both'} diverged"
    means = {arm: one["mean"] for arm, one in finals.items() if one["n"]}
    best = [arm for arm, mean in means.items() if mean == max(means.values())]
    return CellResult(finals, differences, told, best)

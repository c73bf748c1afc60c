"""The cells of a sweep: trained together where only learning rates differ, and what each says."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from bnjax import paired
from bnjax.data import Dataset
from bnjax.paired import Arm, States
from bnjax.training import Batch
from experiments.lab import arms, grids, metrics
from experiments.lab.console import format_summary
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
    final = {
        arm: {name: values[-1].reshape(len(group), count) for name, values in of_arm.items()}
        for arm, of_arm in metrics.curves(lines, first.arms).items()
    }
    return [
        SweepCell(
            one.activation,
            one.batch_size,
            one.learning_rate,
            {arm: {m: v[k].tolist() for m, v in of_arm.items()} for arm, of_arm in final.items()},
        )
        for k, one in enumerate(group)
    ]


class CellResult(NamedTuple):
    """What a cell says.

    Attributes:
        summary: as `summary.json` of a run.
        told: of each arm but the reference its difference in test accuracy, or who diverged.
        best: the arms of the highest test accuracy, by the mean over the replicates in which it
            is finite; none where all diverged, several where they tie.
    """

    summary: dict[str, Any]
    told: dict[str, str]
    best: list[str]


def summarize_cell(cell: SweepCell, reference: str, labels: Mapping[str, str]) -> CellResult:
    """What each arm is worth in a cell, against the reference."""
    last = {
        arm: {metric: np.array([values]) for metric, values in of_arm.items()}
        for arm, of_arm in cell.values.items()
    }
    summary = metrics.summarize(last, reference)
    means = {arm: of_arm[METRIC]["mean"] for arm, of_arm in summary["arms"].items()}
    told = {}
    for arm, difference in summary["differences"].items():
        lost = [labels[one] for one in (arm, reference) if means[one] is None]
        told[arm] = f"{lost[0] if len(lost) == 1 else 'both'} diverged"
        if difference[METRIC]["n"]:
            told[arm] = format_summary(METRIC, difference[METRIC], difference=True)
    highest = max((mean for mean in means.values() if mean is not None), default=np.nan)
    return CellResult(summary, told, [arm for arm, mean in means.items() if mean == highest])

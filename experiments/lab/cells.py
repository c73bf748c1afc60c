"""The cells of a sweep: trained together where only learning rates differ, and what each says."""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from bnjax import paired
from bnjax.data import Dataset
from bnjax.paired import Arm
from experiments.lab import arms, metrics, scratch
from experiments.lab.console import format_summary
from experiments.lab.presets import Experiment

METRIC = "test_accuracy"
SETTING = attrgetter("activation", "batch_size", "learning_rate")  # of an experiment
ADAM = optax.inject_hyperparams(optax.adam)(learning_rate=1.0)


class SweepCell(NamedTuple):
    """One setting, and its metrics after the last epoch: `{arm: {metric: [R]}}`."""

    activation: str
    batch_size: int
    learning_rate: float
    values: dict[str, dict[str, list[float]]]

    @property
    def name(self) -> str:
        """The setting in words."""
        shown = f"{self.activation}, batches of {self.batch_size}"
        return f"{shown}, learning rate {self.learning_rate:g}"


def train(group: Sequence[Experiment], dataset: Dataset) -> list[SweepCell]:
    """The cells of experiments that differ in the learning rate alone, by one program."""
    first, count = group[0], group[0].replicates
    rates = np.repeat([one.learning_rate for one in group], count).astype(np.float32)
    epochs = scratch.train(
        [Arm(arm.name, arm.module, ADAM) for arm in arms.make_arms(first)],
        jnp.tile(paired.replicate_keys(first.seed, count), len(group)),
        *scratch.batches(dataset),
        epochs=first.epochs,
        batch_size=first.batch_size,
        drop_last=first.drop_last,
        change=lambda states: {arm: scratch.with_rates(s, rates) for arm, s in states.items()},
    )
    curves = scratch.curves(epochs, first.arms)

    def final(k: int) -> dict[str, dict[str, list[float]]]:
        own = slice(k * count, (k + 1) * count)
        return {
            arm: {metric: values[-1, own].tolist() for metric, values in of_arm.items()}
            for arm, of_arm in curves.items()
        }

    return [SweepCell(*SETTING(one), final(k)) for k, one in enumerate(group)]


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

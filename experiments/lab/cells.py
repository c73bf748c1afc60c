"""The cells of a sweep: trained together where only learning rates differ, and what each says."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

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
AXES = ("activation", "batch_size", "learning_rate")
ADAM = optax.inject_hyperparams(optax.adam)(learning_rate=1.0)

Values = dict[str, dict[str, list[float | None]]]  # {arm: {metric: [R]}}, None where not finite


@dataclass(frozen=True)
class SweepCell:
    """One setting, and its metrics after the last epoch."""

    experiment: Experiment
    values: Values

    @property
    def setting(self) -> dict[str, Any]:
        """Its place in the grid."""
        return {axis: getattr(self.experiment, axis) for axis in AXES}

    @property
    def name(self) -> str:
        """The setting in words."""
        activation, size, rate = self.setting.values()
        return f"{activation}, batches of {size}, learning rate {rate:g}"

    @cached_property
    def summary(self) -> dict[str, Any]:
        """As `summary.json` of a run."""
        last = {
            arm: {metric: np.array([values], np.float64) for metric, values in of_arm.items()}
            for arm, of_arm in self.values.items()
        }
        return metrics.summarize(last, str(self.experiment.reference))

    @property
    def best(self) -> list[str]:
        """The arms of the highest mean test accuracy; none where all diverged, several in a tie."""
        means = {arm: of_arm[METRIC]["mean"] for arm, of_arm in self.summary["arms"].items()}
        highest = max((mean for mean in means.values() if mean is not None), default=np.nan)
        return [arm for arm, mean in means.items() if mean == highest]

    def numbers(self) -> dict[str, Any]:
        """The cell as `sweep.json` has it."""
        found = {"differences": self.summary["differences"], "best": self.best}
        return {**self.setting, "values": self.values, **found}

    def points(self, arm: str) -> float:
        """Points of test accuracy that an arm is worth; NaN where no pair of networks is finite."""
        mean = self.summary["differences"][arm][METRIC]["mean"]
        return np.nan if mean is None else 100 * mean

    def tell(self, arm: str) -> str:
        """The same in words, or who diverged."""
        difference = self.summary["differences"][arm][METRIC]
        if difference["n"]:
            return format_summary(METRIC, difference, difference=True)
        pair = {one: self.summary["arms"][one][METRIC] for one in (arm, self.summary["reference"])}
        lost = [arms.find(one).label for one, found in pair.items() if not found["n"]]
        return f"{lost[0] if len(lost) == 1 else 'both'} diverged"


def train(group: Sequence[Experiment], dataset: Dataset) -> list[Values]:
    """The final metrics of experiments that differ in the learning rate alone, by one program."""
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
    return [
        {
            arm: {metric: of[-1, start : start + count].tolist() for metric, of in of_arm.items()}
            for arm, of_arm in curves.items()
        }
        for start in range(0, len(rates), count)
    ]

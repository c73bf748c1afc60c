"""What the commands share, and what a script of one's own begins with."""

from experiments.lab.arms import ArmSpec
from experiments.lab.loop import train
from experiments.lab.presets import PRESETS, Experiment
from experiments.lab.run import Run

__all__ = ["PRESETS", "ArmSpec", "Experiment", "Run", "train"]

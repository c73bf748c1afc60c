"""What the commands share, and what a script of one's own begins with.

Two errors are for the user, each a sentence that says what to do: a `ValueError` where something
cannot be as it was asked for, and its kind `bnjax.errors.CheckpointError` where what a run has left
is not there as it was written.
"""

from experiments.lab.arms import ArmSpec
from experiments.lab.loop import train
from experiments.lab.presets import PRESETS, Experiment
from experiments.lab.run import Run

__all__ = ["PRESETS", "ArmSpec", "Experiment", "Run", "train"]

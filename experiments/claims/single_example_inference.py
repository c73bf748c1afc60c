"""Predicting one image at a time needs population statistics."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from bnjax.training import Batch, TrainState
from experiments.claims import STYLES, Check, Claim, Evidence, Settings, collect
from experiments.lab.arms import make_arms
from experiments.lab.presets import LAB10
from experiments.lab.scratch import accuracy_of, predict, train, unstack
from experiments.report import figures

PRESET = LAB10
EPOCHS = 10


def run(settings: Settings) -> Evidence:
    """Predictions of single test images in training and in evaluation mode."""
    keys = settings.keys(3, 10)
    arm, data, epochs = make_arms(PRESET)[0], settings.data(), settings.either(1, EPOCHS)
    *_, last = train([arm], keys, *data, epochs=epochs, batch_size=PRESET.batch_size)
    found = [_look(state, data[1]) for state in unstack(last.states["bn"])]
    *values, votes = zip(*found, strict=True)
    return collect(CLAIM.checks, values, {"votes": votes[0]}, settings.incomparable())


def _look(state: TrainState, test: Batch) -> tuple[Any, ...]:
    """What the checks ask for, and how often each class is predicted in both modes."""
    images = jnp.asarray(test.images)
    twice = predict(state, images.repeat(2, axis=0), 2, train=True)[::2]
    alone = predict(state, images, 1, train=False)
    hundred = predict(state, images[:100], 100, train=True)
    votes = [np.bincount(classes, minlength=10) for classes in (twice, alone)]
    return (
        100 * votes[0].max() / votes[0].sum(),
        _is_refused(state, images[:1]),
        *(100 * accuracy_of(found, test.labels) for found in (alone, twice)),
        100 * float((hundred != alone[:100]).mean()),
        votes,
    )


def _is_refused(state: TrainState, image: jax.Array) -> bool:
    try:
        predict(state, image, 1, train=True)
    except ValueError:
        return True
    return False


def draw(evidence: Evidence) -> Figure:
    """The classes that single images get in both modes."""
    figure, row = figures.panels(["Batch statistics, fed twice", "Population statistics"])
    for axes, votes in zip(row, evidence.picture["votes"], strict=True):
        axes.bar(range(10), votes, color=STYLES["bn"]["color"])
        axes.set(xticks=range(10), xlabel="predicted class", ylabel="test images")
    return figure


CLAIM = Claim(
    id="single-example-inference",
    statement="With batch statistics, predictions for one image at a time are worthless; with "
    "population statistics they are as good as any.",
    source="Udacity, Deep learning nanodegree, lesson Batch Normalization; notebook "
    "lab10_train_eval",
    setup=f"784-32-32-10 with batch normalization, Adam 0.01, batches of 32, {EPOCHS} epochs "
    "(quick: one). A single image has no batch statistics, so each is fed twice.",
    criterion="In every replicate all images fed twice get one class, and an image fed alone in "
    "training mode is an error; with population statistics the mean accuracy is at least 93 %.",
    checks=(
        Check("images in the commonest class in %, fed twice", "all", 100.0, 100.0, "each"),
        Check("one image alone in training mode is refused", "an error", 1.0, 1.0, "each"),
        Check("test accuracy in %, population statistics", "97", low=93.0, original=True),
        Check("test accuracy in %, fed twice", ""),
        Check("predictions in %, changed by training mode in 100 images", ""),
    ),
    seconds=(9, 35),
    run=run,
    draw=draw,
)

"""Predicting one image at a time needs population statistics."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from bnjax.training import Batch, TrainState
from experiments.claims import Check, Claim, Evidence, Settings, collect, draw_lines
from experiments.lab.arms import make_arms
from experiments.lab.presets import LAB10
from experiments.lab.scratch import accuracy_of, predict, train, unstack

EPOCHS = 10
KINDS = {"twice": "batch statistics, fed twice", "alone": "population statistics"}


def run(settings: Settings) -> Evidence:
    """Predictions of single test images in training and in evaluation mode."""
    keys = settings.keys(3, 10)
    arm, data, epochs = make_arms(LAB10)[0], settings.data(), settings.either(1, EPOCHS)
    *_, last = train([arm], keys, *data, epochs=epochs, batch_size=LAB10.batch_size)
    found = [_look(state, data[1]) for state in unstack(last.states["bn"])]
    *values, twice, alone = zip(*found, strict=True)
    panels = {"Predicted classes, first replicate": {"twice": twice[:1], "alone": alone[:1]}}
    return collect(CLAIM.checks, values, panels, range(10), settings.incomparable())


def _look(state: TrainState, test: Batch) -> tuple[Any, ...]:
    """What the checks ask for, and how often each class is predicted in both modes."""
    images = jnp.asarray(test.images)
    twice = predict(state, images.repeat(2, axis=0), 2, train=True)[::2]
    alone = predict(state, images, 1, train=False)
    hundred = predict(state, images[:100], 100, train=True)
    votes = [np.bincount(classes, minlength=10) for classes in (twice, alone)]
    try:
        predict(state, images[:1], 1, train=True)
        refused = False
    except ValueError:
        refused = True
    return (
        100 * votes[0].max() / votes[0].sum(),
        refused,
        *(100 * accuracy_of(found, test.labels) for found in (alone, twice)),
        100 * float((hundred != alone[:100]).mean()),
        *votes,
    )


CLAIM = Claim(
    id="single-example-inference",
    statement="With batch statistics, predictions for one image at a time are worthless; with "
    "population statistics they are as good as any.",
    source="Udacity, Deep learning nanodegree, lesson Batch Normalization; notebook "
    "lab10_train_eval",
    setup=f"784-32-32-10 with batch normalization, Adam 0.01, batches of 32, {EPOCHS} epochs "
    "(quick: one). A single image has no batch statistics, so each is fed twice.",
    checks=(
        Check("images in the commonest class in %, fed twice", "all", 100.0, 100.0, "each"),
        Check("one image alone in training mode is refused", "an error", 1.0, 1.0, "each"),
        Check("test accuracy in %, population statistics", "97", low=93.0, original=True),
        Check("test accuracy in %, fed twice", ""),
        Check("predictions in %, changed by training mode in 100 images", ""),
    ),
    seconds=(9, 35),
    run=run,
    draw=draw_lines(KINDS, xlabel="class", ylabel="test images"),
)

"""What the networks say of the test set: which classes they confuse, and where they disagree."""

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from experiments.report.figures import Probes
from experiments.report.page import png_uri

CLASSES = 10


class Digit(NamedTuple):
    """A test example that one network alone gets right.

    Attributes:
        uri: its picture.
        label: its class.
        taken: what another network takes it for.
    """

    uri: str
    label: int
    taken: int


def confusion(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """`[10, 11]`, how many examples of a class (row) are taken for a class (column).

    The last column is of all other outputs: a network may have more than there are classes.

    Example:
        >>> confusion(np.array([0, 0, 1]), np.array([0, 1, 300]))[:2, [0, 1, 10]].tolist()
        [[1, 1, 0], [0, 0, 1]]
    """
    counts = np.zeros((CLASSES, CLASSES + 1), int)
    np.add.at(counts, (labels, np.minimum(predictions, CLASSES)), 1)
    return counts


def off_diagonal(counts: np.ndarray) -> np.ndarray:
    """The mistakes alone."""
    return counts * (np.eye(*counts.shape) == 0)


def classes(confusions: Mapping[str, np.ndarray]) -> list[str]:
    """The columns that tables of them need."""
    others = any(counts[:, -1].any() for counts in confusions.values())
    return [*map(str, range(CLASSES)), *["other"] * others]


def confusions(end: Probes, arms: Sequence[str]) -> dict[str, np.ndarray]:
    """The confusion matrix of each arm, from the probes of the end."""
    return {arm: confusion(end["labels"], end[f"{arm}/predictions"]) for arm in arms}


def disagreements(end: Probes, arms: Sequence[str], reference: str) -> dict[str, list[Digit]]:
    """Of each arm the first test examples that it alone gets right, from the probes of the end.

    They are taken for what the reference says, and where that is right, the first of the others;
    none where there are no others.
    """
    first = next((arm for arm in arms if arm != reference), None)
    return {
        arm: [
            Digit(_draw(image), int(end["labels"][place]), int(end[f"{other}/predictions"][place]))
            for image, place in zip(end[f"images_{arm}"], end[f"only_{arm}"], strict=True)
        ]
        for arm in arms
        if (other := first if arm == reference else reference)
    }


def _draw(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    return png_uri(buffer.getvalue())

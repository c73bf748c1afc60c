"""What the networks say of the test set: which classes they confuse, and where they disagree."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from experiments.report.figures import Probes

CLASSES = 10


def confusion(end: Probes, arm: str) -> np.ndarray:
    """`[10, 11]`, how many test examples of a class (row) are taken for a class (column).

    The last column is of all other outputs: a network may have more than there are classes.

    Args:
        end: probes of the end.
        arm: of which network.

    Example:
        >>> end = {"labels": np.array([0, 0, 1]), "bn/predictions": np.array([0, 1, 300])}
        >>> confusion(end, "bn")[:2, [0, 1, 10]].tolist()
        [[1, 1, 0], [0, 0, 1]]
    """
    counts = np.zeros((CLASSES, CLASSES + 1), int)
    np.add.at(counts, (end["labels"], np.minimum(end[f"{arm}/predictions"], CLASSES)), 1)
    return counts


def mistakes(counts: np.ndarray) -> np.ndarray:
    """A confusion matrix without its diagonal."""
    return counts * (np.eye(*counts.shape) == 0)


def disagreements(
    end: Probes, arms: Sequence[str], reference: str
) -> dict[str, list[tuple[bytes, int, int]]]:
    """Of each arm the first test examples that it alone gets right: a PNG, class, taken for.

    They are taken for what the reference says, and where that is right, the first of the others;
    none where there are no others.
    """
    first = next((arm for arm in arms if arm != reference), None)
    return {
        arm: [
            (_draw(image), int(end["labels"][place]), int(end[f"{other}/predictions"][place]))
            for image, place in zip(end[f"images_{arm}"], end[f"only_{arm}"], strict=True)
        ]
        for arm in arms
        if (other := first if arm == reference else reference)
    }


def _draw(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    return buffer.getvalue()

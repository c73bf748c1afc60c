"""What several replicates say together."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Summary(NamedTuple):
    """Mean and sample standard deviation (None for a single value) of `n` finite values."""

    mean: float | None
    sd: float | None
    n: int


def summarize(values: ArrayLike) -> Summary:
    """Mean and sample standard deviation (n - 1) of the finite values.

    Args:
        values: `[R]`, one value per replicate.

    Example:
        >>> summarize([1.0, 3.0, float("nan")])
        Summary(mean=2.0, sd=1.4142135623730951, n=2)
    """
    finite = np.asarray(values, np.float64)
    finite = finite[np.isfinite(finite)]
    return Summary(
        mean=float(finite.mean()) if len(finite) else None,
        sd=float(finite.std(ddof=1)) if len(finite) > 1 else None,
        n=len(finite),
    )


def paired_difference(first: ArrayLike, second: ArrayLike) -> Summary:
    """Summary of `first - second`, replicate by replicate.

    Args:
        first: `[R]`.
        second: `[R]`, in the same order.

    Example:
        >>> paired_difference([3.0, 5.0], [1.0, 1.0]).mean
        3.0
    """
    return summarize(np.asarray(first, np.float64) - np.asarray(second, np.float64))

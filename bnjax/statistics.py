"""What several replicates say together."""

from typing import NamedTuple

import numpy as np
import scipy  # which loads `special` where it is used: a fifth of a second, at the end of a run
from numpy.typing import ArrayLike


class Summary(NamedTuple):
    """What `n` finite values say about the mean that they come from.

    Attributes:
        mean: None without values.
        sd: sample standard deviation (n - 1), None for fewer than two values.
        interval: 95 % confidence interval of the mean, None for fewer than two values.
        n: number of finite values.
    """

    mean: float | None
    sd: float | None
    interval: tuple[float, float] | None
    n: int


class Difference(NamedTuple):
    """What `n` finite differences between two members of a pair say.

    Attributes:
        mean, sd, interval, n: as in `Summary`, of first minus second.
        wins: number of pairs whose first member is the better one.
        ties: number of pairs with equal members.
        p: two-sided p-value of the sign test: how probable a majority at least as large is if the
            toss of a coin decided each pair that is not tied. None where all are.
    """

    mean: float | None
    sd: float | None
    interval: tuple[float, float] | None
    n: int
    wins: int
    ties: int
    p: float | None


def summarize(values: ArrayLike) -> Summary:
    """Mean, standard deviation and Student's interval, mean ± t(n - 1) sd / sqrt(n), of a sample.

    Args:
        values: `[R]`, one value per replicate; those that are not finite are left out.

    Example:
        >>> summary = summarize([1.0, 3.0, float("nan")])
        >>> summary.mean, [round(bound, 3) for bound in summary.interval], summary.n
        (2.0, [-10.706, 14.706], 2)
    """
    finite = np.asarray(values, np.float64)
    finite = finite[np.isfinite(finite)]
    n = len(finite)
    if n < 2:
        return Summary(float(finite[0]) if n else None, None, None, n)
    mean, sd = float(finite.mean()), float(finite.std(ddof=1))
    half = float(scipy.special.stdtrit(n - 1, 0.975)) * sd / n**0.5
    return Summary(mean, sd, (mean - half, mean + half), n)


def paired_difference(
    first: ArrayLike, second: ArrayLike, *, lower_is_better: bool = False
) -> Difference:
    """What `first - second`, replicate by replicate, says about which is better.

    Args:
        first, second: `[R]`, in the same order.
        lower_is_better: as of a loss.

    Raises:
        ValueError: if they are not equally many.

    Source: the sign test is Arbuthnot's (1710); interval and test are those of
    `scipy.stats.ttest_1samp` and `scipy.stats.binomtest`.

    Example:
        >>> paired_difference([3.0, 5.0, 4.0], [1.0, 1.0, 4.0])[3:]
        (3, 2, 1, 0.5)
    """
    if np.shape(first) != np.shape(second):
        raise ValueError(f"no pairs: {np.shape(first)} values against {np.shape(second)}")
    with np.errstate(invalid="ignore"):  # infinity minus infinity is left out
        difference = np.subtract(first, second, dtype=np.float64)
    difference = difference[np.isfinite(difference)]
    wins = int(np.sum(difference < 0 if lower_is_better else difference > 0))
    ties = int(np.sum(difference == 0))
    untied = len(difference) - ties
    tail = scipy.special.bdtr(min(wins, untied - wins), untied, 0.5)
    p = min(1.0, 2 * float(tail)) if untied else None
    return Difference(*summarize(difference), wins, ties, p)

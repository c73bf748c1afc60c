import numpy as np
import pytest
from scipy import stats

from bnjax.statistics import Difference, Summary, paired_difference, summarize


@pytest.mark.parametrize("n", [2, 3, 9, 40])
def test_summary_agrees_with_scipy(n):
    values = np.random.default_rng(n).normal(3.0, 2.0, size=n)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    summary = summarize([*values, np.nan])
    assert (summary.mean, summary.sd, summary.n) == pytest.approx(
        (values.mean(), values.std(ddof=1), n)
    )
    assert summary.interval == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_one_value_has_no_spread_and_none_has_no_mean():
    assert summarize([2.0]) == Summary(2.0, None, None, 1)
    assert summarize([np.nan, np.inf]) == Summary(None, None, None, 0)


def test_the_difference_is_taken_pair_by_pair():
    first, second = [1.0, 2.0, np.nan, 5.0, np.inf], [0.5, 1.0, 1.0, np.inf, np.inf]
    difference = paired_difference(first, second)
    expected = stats.ttest_rel([1.0, 2.0], [0.5, 1.0]).confidence_interval(0.95)
    assert difference[:2] == pytest.approx((0.75, np.sqrt(0.125)))
    assert difference.interval == pytest.approx((expected.low, expected.high))
    assert difference.n == 2


@pytest.mark.parametrize("lower_is_better", [False, True])
@pytest.mark.parametrize(("above", "below", "ties"), [(8, 0, 0), (6, 2, 0), (4, 4, 1), (1, 9, 3)])
def test_sign_test_agrees_with_scipy(above, below, ties, lower_is_better):
    differences = [1.5] * above + [-0.5] * below + [0.0] * ties
    result = paired_difference(
        differences, np.zeros(len(differences)), lower_is_better=lower_is_better
    )
    assert result.wins == (below if lower_is_better else above)
    assert (result.n, result.ties) == (above + below + ties, ties)
    expected = stats.binomtest(above, above + below).pvalue
    assert result.p == pytest.approx(expected, rel=1e-12)


def test_nothing_but_ties_or_nothing_at_all_is_no_test():
    assert paired_difference([1.0, 1.0], [1.0, 1.0]) == Difference(0, 0, (0, 0), 2, 0, 2, None)
    assert paired_difference([np.nan], [1.0]) == Difference(None, None, None, 0, 0, 0, None)


def test_unequal_numbers_are_no_pairs():
    with pytest.raises(ValueError, match="no pairs"):
        paired_difference([1.0, 2.0], [1.0])

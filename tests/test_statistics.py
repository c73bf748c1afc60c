import numpy as np
import pytest

from bnjax.statistics import Summary, paired_difference, summarize


def test_summary_is_mean_and_sample_standard_deviation():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=9)
    summary = summarize(values)
    assert summary == pytest.approx((values.mean(), values.std(ddof=1), 9))


def test_one_value_has_no_spread_and_none_has_no_mean():
    assert summarize([2.0]) == Summary(2.0, None, 1)
    assert summarize([np.nan, np.inf]) == Summary(None, None, 0)


def test_the_difference_is_taken_pair_by_pair():
    first, second = [1.0, 2.0, np.nan, 5.0], [0.5, 1.0, 1.0, np.inf]
    assert paired_difference(first, second) == pytest.approx((0.75, np.sqrt(0.125), 2))

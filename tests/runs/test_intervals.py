"""Intervals of means: their coverage and their width."""

import math

import numpy as np
import pytest

from dpo.runs.intervals import MOST_RESAMPLED, mean_interval, weighted_mean_interval


def test_the_interval_of_a_share_is_that_of_the_binomial_distribution() -> None:
    low, high = mean_interval([1] * 60 + [0] * 40)
    width = 1.96 * math.sqrt(0.6 * 0.4 / 100)  # normal approximation: 0.096
    assert (low, high) == pytest.approx((0.6 - width, 0.6 + width), abs=0.01)


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_intervals_contain_the_mean_as_often_as_they_say(draw: str) -> None:
    generator = np.random.default_rng(0)
    mean = {"normal": 0.0, "exponential": 1.0}[draw]
    intervals = [mean_interval(getattr(generator, draw)(size=100)) for _ in range(200)]
    assert 0.90 <= np.mean([low <= mean <= high for low, high in intervals]) <= 0.99  # 0.95 +- 3 standard errors


def test_many_values_use_the_normal_approximation() -> None:
    values = np.arange(MOST_RESAMPLED + 1) % 2
    low, high = mean_interval(values)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / len(values) ** 0.5, rel=0.1)


def test_no_values_have_no_interval() -> None:
    assert all(map(math.isnan, mean_interval([])))


def test_groups_are_resampled_by_themselves_and_weighted() -> None:
    """Means of 100 and 400 zeros and ones: the standard error of w1 m1 + w2 m2 by the normal approximation."""
    groups = [[1] * 60 + [0] * 40, [1] * 80 + [0] * 320]
    low, high = weighted_mean_interval(groups, [0.7, 0.3])
    middle = 0.7 * 0.6 + 0.3 * 0.2
    error = (0.7**2 * 0.6 * 0.4 / 100 + 0.3**2 * 0.2 * 0.8 / 400) ** 0.5
    assert low == pytest.approx(middle - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(middle + 1.96 * error, abs=0.15 * error)
    assert weighted_mean_interval(groups[:1], [1.0]) == mean_interval(groups[0])
    assert all(map(math.isnan, weighted_mean_interval([[1.0], []], [0.5, 0.5])))

"""Bootstrap intervals of means."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2_000
MOST_RESAMPLED = 20_000  # values; from there on the normal approximation is as good and takes no time


def mean_interval(values: ArrayLike, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a mean (Efron and Tibshirani 1993, chapter 13).

    Args:
        values: The values, one for every independent draw.
        level: Share of the intervals that contain the true mean.
        seed: Seed of the resampling; the same values give the same interval.

    Returns:
        Lower and upper end; (nan, nan) without values.
    """
    return weighted_mean_interval([values], [1.0], level, seed)


def weighted_mean_interval(
    groups: Sequence[ArrayLike], weights: Sequence[float], level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a weighted sum of the means of groups, each resampled by itself.

    Args:
        groups: The values of every group.
        weights: Factor of the mean of every group.
        level: Share of the intervals that contain the true value.
        seed: Seed of the resampling.

    Returns:
        Lower and upper end; (nan, nan) if a group has no values.
    """
    arrays = [np.asarray(values, dtype=np.float64).ravel() for values in groups]
    if not all(map(len, arrays)):
        return float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    means = sum(weight * _resampled_means(array, generator) for weight, array in zip(weights, arrays, strict=True))
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _resampled_means(numbers: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    count = len(numbers)
    if count > MOST_RESAMPLED:
        return generator.normal(numbers.mean(), numbers.std() / count**0.5, RESAMPLES)
    if np.isin(numbers, (0, 1)).all():  # resampling zeros and ones is a binomial draw
        return generator.binomial(count, numbers.mean(), RESAMPLES) / count
    return np.array([numbers[generator.integers(count, size=count)].mean() for _ in range(RESAMPLES)])

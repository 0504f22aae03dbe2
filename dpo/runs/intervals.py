"""Bootstrap intervals of means."""

import numpy as np
from numpy.typing import ArrayLike

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
    numbers = np.asarray(values, dtype=np.float64).ravel()
    count = len(numbers)
    if count == 0:
        return float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    if count > MOST_RESAMPLED:
        means = generator.normal(numbers.mean(), numbers.std() / count**0.5, RESAMPLES)
    elif np.isin(numbers, (0, 1)).all():  # resampling zeros and ones is a binomial draw
        means = generator.binomial(count, numbers.mean(), RESAMPLES) / count
    else:
        means = np.array([numbers[generator.integers(count, size=count)].mean() for _ in range(RESAMPLES)])
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)

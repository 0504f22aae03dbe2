"""What can be said of a policy from the margins of single pairs, each with a 95 % interval.

A margin is the reward of the chosen answer minus that of the rejected one; the policy agrees with a label where it is
above 0. Intervals are percentile bootstrap intervals. All but those of means are drawn as counts of bins, so that their
time does not grow with the number of pairs.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpo.runs.intervals import mean_interval

Numbers = NDArray[np.float64]
DRAWS = 500  # bootstrap samples of an estimate that is no mean
CALIBRATION_BINS = 10
FLIP_BINS = 100
NGRAM = 4  # words; repeated ones are what a reader sees as repetition


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; both ends are nan if there is none."""

    value: float
    low: float = float("nan")
    high: float = float("nan")

    @property
    def has_interval(self) -> bool:
        """Whether the uncertainty is known."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))

    def __str__(self) -> str:
        if not self.has_interval:
            return f"{self.value:.3f} (no interval: single pairs are not known)"
        return f"{self.value:.3f} (95 % interval {self.low:.3f} to {self.high:.3f})"


def mean_estimate(values: ArrayLike) -> Estimate:
    """Return the mean of values, one for every pair."""
    numbers = np.asarray(values, dtype=np.float64)
    return Estimate(float(numbers.mean()) if len(numbers) else float("nan"), *mean_interval(numbers))


def share_estimate(share: float, count: int | None) -> Estimate:
    """Return a share of `count` pairs as an estimate; without an interval if the count is not known."""
    if count is None or not np.isfinite(share):
        return Estimate(share)
    hits = round(share * count)
    return Estimate(share, *mean_interval(np.repeat([1.0, 0.0], [hits, count - hits])))


def _quantiles(value: float, draws: Numbers) -> Estimate:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


@dataclass(frozen=True)
class Calibration:
    """How often the policy is right by how sure it is; arrays have one value per bin that is not empty.

    Attributes:
        confidences: Mean of max(S(margin), S(-margin)).
        accuracies: Share of margins above 0.
        counts: Pairs.
        error: Expected calibration error, the mean of |accuracy - confidence| over bins, weighted by their pairs.
        chance: The error that a perfectly calibrated policy exceeds in 2.5 % of data sets of this size.
    """

    confidences: Numbers
    accuracies: Numbers
    counts: NDArray[np.int64]
    error: Estimate
    chance: float

    @property
    def overconfidence(self) -> float:
        """Mean confidence minus accuracy."""
        return float(np.average(self.confidences - self.accuracies, weights=self.counts))


def calibrate(margins: Numbers) -> Calibration:
    """Return the reliability of S(margin) as a probability, in bins of equal width (Guo et al. 2017, 1706.04599)."""
    generator = np.random.default_rng(0)
    confidences = 1 / (1 + np.exp(-np.abs(margins)))
    bins = np.minimum((confidences * 2 - 1) * CALIBRATION_BINS, CALIBRATION_BINS - 1).astype(int)
    all_counts = np.bincount(bins, minlength=CALIBRATION_BINS)
    used = all_counts > 0
    counts = all_counts[used]
    means = np.bincount(bins, confidences, CALIBRATION_BINS)[used] / counts
    hits = np.bincount(bins, margins > 0, CALIBRATION_BINS)[used]
    total = counts.sum()

    def errors(drawn_hits: NDArray[Any], drawn_counts: NDArray[Any]) -> Numbers:
        return np.asarray(np.abs(drawn_hits - drawn_counts * means).sum(-1) / total)

    cells = generator.multinomial(total, np.concatenate([hits, counts - hits]) / total, DRAWS)
    drawn_hits, drawn_misses = np.split(cells, 2, axis=1)
    perfect = errors(generator.binomial(counts, means, (DRAWS, len(counts))), counts)
    error = _quantiles(float(errors(hits, counts)), errors(drawn_hits, drawn_hits + drawn_misses))
    return Calibration(means, hits / counts, counts, error, float(np.quantile(perfect, 0.975)))


@dataclass(frozen=True)
class LengthEffect:
    """Whether the policy prefers an answer for its length. Pairs with answers of equal length are left out.

    Attributes:
        longer_wins: Share of pairs whose chosen answer is the longer one, the accuracy of preferring the longer.
        accuracy_if_longer: Accuracy where the chosen answer is the longer one.
        accuracy_if_shorter: Accuracy where the chosen answer is the shorter one.
        gap: Their difference: 0 if length does not matter, 1 if "longer" alone decides, -1 if "shorter" does.
        balanced: Their mean, what the policy knows beyond length: 0.5 if length alone decides.
    """

    longer_wins: Estimate
    accuracy_if_longer: Estimate
    accuracy_if_shorter: Estimate
    gap: Estimate
    balanced: Estimate

    @property
    def baseline(self) -> float:
        """Accuracy of the better of "longer wins" and "shorter wins"."""
        return max(self.longer_wins.value, 1 - self.longer_wins.value)


def length_effect(margins: Numbers, length_differences: Numbers) -> LengthEffect | None:
    """Return the effect of length (as Park et al. 2024, 2403.19159); None if all longer or all shorter answers won."""
    generator = np.random.default_rng(0)
    is_longer, is_shorter = length_differences > 0, length_differences < 0
    if not is_longer.any() or not is_shorter.any():
        return None
    right = (margins > 0).astype(float)
    longer, shorter = right[is_longer], right[is_shorter]
    draws = [generator.binomial(len(part), part.mean(), DRAWS) / len(part) for part in (longer, shorter)]
    return LengthEffect(
        longer_wins=mean_estimate(is_longer[is_longer | is_shorter]),
        accuracy_if_longer=mean_estimate(longer),
        accuracy_if_shorter=mean_estimate(shorter),
        gap=_quantiles(longer.mean() - shorter.mean(), draws[0] - draws[1]),
        balanced=_quantiles((longer.mean() + shorter.mean()) / 2, (draws[0] + draws[1]) / 2),
    )


@dataclass(frozen=True)
class FlipShare:
    """Estimated share of flipped labels.

    Attributes:
        share: The share e.
        sharpness: The factor a by which margins are multiplied.
        sizes: Mean of |margin| in every bin.
        agreements: Share of pairs in every bin in which the policy agrees with the label.
    """

    share: Estimate
    sharpness: float
    sizes: Numbers
    agreements: Numbers

    def expected_agreement(self, sizes: Numbers) -> Numbers:
        """Return the agreement that the fit expects at |margin|; it rises to 1 - e."""
        return np.asarray(self.share.value + (1 - 2 * self.share.value) / (1 + np.exp(-self.sharpness * sizes)))


def estimate_flips(margins: Numbers) -> FlipShare | None:
    """Estimate how many labels are flipped, from margins of pairs that were not trained on.

    If a share e of labels is flipped at random, and S(a m) is the probability of the clean label, the observed label
    has the probability (1 - e) S(a m) + e S(-a m): the model of robust DPO (Chowdhury et al. 2024, 2403.00409, with the
    temperature a added, because margins need not be calibrated). e in [0, 0.5) and a > 0 are those of maximum
    likelihood, on a grid. The share is identified by the surest pairs: where labels are clean, the policy is right in
    nearly all of these. Errors of which a policy is sure count as flips, so a policy that is wrong with confidence
    makes it too high.

    Args:
        margins: Margins of held-out pairs; ties say nothing and are left out.

    Returns:
        The estimate; None with fewer pairs than `FLIP_BINS`.
    """
    margins = margins[margins != 0]
    count = len(margins)
    if count < FLIP_BINS:
        return None
    order = np.argsort(np.abs(margins))
    parts = np.array_split(margins[order], FLIP_BINS)
    sizes = np.array([np.abs(part).mean() for part in parts])
    agreed = np.array([(part > 0).sum() for part in parts])
    pairs = np.array([len(part) for part in parts])
    shares = np.arange(0, 0.5, 0.005)
    factors = np.geomspace(0.02, 50, 60) / np.median(sizes)
    sure = 1 / (1 + np.exp(-np.clip(np.multiply.outer(sizes, factors), 0, 500)))  # bins x factors
    likelihood = shares[:, None] + (1 - 2 * shares)[:, None] * sure[:, None, :]  # bins x shares x factors
    cell_values = np.concatenate([np.log(likelihood), np.log(np.maximum(1 - likelihood, 1e-12))]).reshape(
        2 * FLIP_BINS, -1
    )
    cells = np.concatenate([agreed, pairs - agreed])
    drawn = np.random.default_rng(0).multinomial(count, cells / count, DRAWS)
    share_index, factor_index = np.unravel_index(np.argmax(cells @ cell_values), (len(shares), len(factors)))
    drawn_shares = shares[np.argmax(drawn @ cell_values, axis=1) // len(factors)]
    return FlipShare(
        _quantiles(float(shares[share_index]), drawn_shares), float(factors[factor_index]), sizes, agreed / pairs
    )


def repeated_share(text: str) -> float:
    """Return the share of a text's sequences of `NGRAM` words that occurred in it before; 0 for shorter texts."""
    words = text.split()
    grams = Counter(zip(*(words[start:] for start in range(NGRAM)), strict=False))
    return 1 - len(grams) / grams.total() if grams else 0.0

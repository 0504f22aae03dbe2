"""Estimates recover what made-up margins were made with."""

import numpy as np
import pytest

from dpo.reports.estimates import calibrate, estimate_flips, length_effect, repeated_share, share_estimate
from tests.support.reports import calibrated_margins, flip_labels


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.3])
def test_the_share_of_flips_is_estimated_without_bias(share: float) -> None:
    """Mean of 20 data sets within three standard errors; at 0 the estimate cannot fall below."""
    estimates = []
    covered = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        margins, _ = flip_labels(rng, 3 * calibrated_margins(rng, 2000, spread=2.5), share)  # three times too sure
        found = estimate_flips(margins)
        assert found is not None
        estimates.append(found.share.value)
        covered += found.share.low <= share <= found.share.high
    error = np.std(estimates) / len(estimates) ** 0.5
    assert np.mean(estimates) == pytest.approx(share, abs=3 * error + 0.005)  # the step of the grid
    assert covered >= 16


def test_flips_cannot_be_estimated_from_few_pairs() -> None:
    assert estimate_flips(np.zeros(1000)) is None
    assert estimate_flips(np.ones(99)) is None


def test_the_calibration_error_is_that_of_its_definition() -> None:
    """Two bins: sure to 0.75 and right in 1 of 2, sure to 0.95 and right in 3 of 4."""
    sizes = np.log([3, 3, 19, 19, 19, 19])
    found = calibrate(sizes * [1, -1, 1, 1, 1, -1])
    assert found.confidences == pytest.approx([0.75, 0.95])
    assert found.accuracies == pytest.approx([0.5, 0.75])
    assert found.error.value == pytest.approx((2 * 0.25 + 4 * 0.2) / 6)
    assert found.overconfidence == pytest.approx((2 * 0.25 + 4 * 0.2) / 6)


def test_a_calibrated_policy_stays_within_chance() -> None:
    found = [calibrate(calibrated_margins(np.random.default_rng(seed), 2000)) for seed in range(40)]
    exceeding = sum(each.error.value > each.chance for each in found)
    assert exceeding <= 4  # of 40, at 2.5 %: more than 4 in 0.3 % of draws


def test_length_alone_has_a_gap_of_one() -> None:
    lengths = np.array([5.0, 5, -5, 0])
    effect = length_effect(np.array([1.0, 2.0, -1.0, 1.0]), lengths)
    assert effect is not None
    assert (effect.gap.value, effect.balanced.value) == (1, 0.5)
    assert effect.longer_wins.value == pytest.approx(2 / 3)
    assert length_effect(np.ones(2), np.array([1.0, 2])) is None


def test_repetition_counts_sequences_of_four_words() -> None:
    assert repeated_share("a b c d a b c d") == pytest.approx(1 - 4 / 5)
    assert repeated_share("a b c d e f") == 0
    assert repeated_share("a a") == 0


def test_a_share_without_a_number_of_pairs_has_no_interval() -> None:
    assert not share_estimate(0.6, None).has_interval
    known = share_estimate(0.6, 100)
    assert known.low == pytest.approx(0.6 - 1.96 * (0.24 / 100) ** 0.5, abs=0.02)

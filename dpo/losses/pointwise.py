"""Losses that judge each answer by itself, and those that compare the sorted answers of a whole batch.

Both need the plain log-ratio D: the partition function does not cancel as it does in a difference within a pair, so no
other divergence is sound here.
"""

from dataclasses import dataclass
from math import log

import torch.nn.functional as F

from dpo.losses.base import (
    BatchLoss,
    PairLogps,
    PairLoss,
    PairValues,
    bounded_field,
    chosen_minus_rejected,
    smoothed_logistic_loss,
    sort_ascending,
)


@dataclass(frozen=True)
class NCA(PairLoss):
    """Noise Contrastive Alignment for pairs: the chosen answer's likelihood must not fall.

    -log S(b D_w) - 1/2 log S(-b D_w) - 1/2 log S(-b D_l)

    Chen et al. 2024, arXiv 2402.05369, NCA with two answers

    Attributes:
        beta: How strongly the policy is held near the reference.
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    initial_loss = 2 * log(2)

    def __call__(self, logps: PairLogps) -> PairValues:
        """The loss of each pair."""
        chosen, rejected = (self.beta * logps.logratios).unbind(-1)
        return -F.logsigmoid(chosen) - (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2  # 2402.05369, NCA, K = 2


@dataclass(frozen=True)
class BCO(PairLoss):
    """Binary Classifier Optimization for pairs, without a reward shift.

    -log S(b D_w) - log S(-b D_l)

    Jung et al. 2024, arXiv 2404.04656, with delta = 0

    Attributes:
        beta: How strongly the policy is held near the reference.
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    initial_loss = 2 * log(2)

    def __call__(self, logps: PairLogps) -> PairValues:
        """The loss of each pair."""
        chosen, rejected = (self.beta * logps.logratios).unbind(-1)
        return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)  # 2404.04656, binary cross-entropy, delta = 0


@dataclass(frozen=True)
class SPPO(PairLoss):
    """Self-Play Preference Optimization with hard labels: log-ratios of 1/(2b) and -1/(2b).

    (D_w - 1/(2b))^2 + (D_l + 1/(2b))^2

    Wu et al. 2024, arXiv 2405.00675, equation 4.7, with probability 1 of the chosen answer

    Attributes:
        beta: 1 / eta of the paper.
    """

    beta: float = bounded_field(0.1, "(0, inf)")

    def __call__(self, logps: PairLogps) -> PairValues:
        """The loss of each pair."""
        (chosen, rejected), target = logps.logratios.unbind(-1), 1 / (2 * self.beta)
        return (chosen - target) ** 2 + (rejected + target) ** 2  # 2405.00675 eq. 4.7, P = 1 and 0

    @property
    def initial_loss(self) -> float:
        """Both targets squared."""
        return 1 / (2 * self.beta**2)


@dataclass(frozen=True)
class APOZero(PairLoss):
    """Anchored Preference Optimization, zero: chosen up, rejected down; for answers better than the policy's own.

    1 - S(b D_w) + S(b D_l)

    D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7

    Attributes:
        beta: How strongly the policy is held near the reference.
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    initial_loss = 1.0

    def __call__(self, logps: PairLogps) -> PairValues:
        """The loss of each pair."""
        chosen, rejected = (self.beta * logps.logratios).unbind(-1)
        return (-chosen).sigmoid() + rejected.sigmoid()  # 2408.06266 eq. 7; 1 - S(x) = S(-x)


@dataclass(frozen=True)
class APODown(PairLoss):
    """Anchored Preference Optimization, down: both down, rejected more; for answers worse than the policy's own.

    S(b D_w) + 1 - S(b h)

    D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8

    Attributes:
        beta: How strongly the policy is held near the reference.
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    initial_loss = 1.0

    def __call__(self, logps: PairLogps) -> PairValues:
        """The loss of each pair."""
        chosen, rejected = (self.beta * logps.logratios).unbind(-1)
        return chosen.sigmoid() + (rejected - chosen).sigmoid()  # 2408.06266 eq. 8


@dataclass(frozen=True)
class AOT(BatchLoss):
    """Alignment via Optimal Transport, paired: the policy's margins dominate the reference's as a distribution.

    cDPO of b (u - v), u = sort(lp_w - lp_l) of the policy, v the same of the reference, over the batch

    Melnyk et al. 2024, arXiv 2406.05882, paired

    Attributes:
        beta: How strongly the policy is held near the reference.
        label_smoothing: e, assumed share of flipped labels.
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    label_smoothing: float = bounded_field(0.0, "[0, 0.5]")
    initial_loss = log(2)

    def __call__(self, logps: PairLogps) -> PairValues:
        """One value per rank; only their sum means something."""
        policy, reference = (
            sort_ascending(chosen_minus_rejected(logps.policy)),
            sort_ascending(chosen_minus_rejected(logps.reference)),
        )
        return smoothed_logistic_loss(self.beta * (policy - reference), self.label_smoothing)  # 2406.05882, paired


@dataclass(frozen=True)
class AOTUnpaired(BatchLoss):
    """Alignment via Optimal Transport, unpaired: chosen rewards dominate rejected ones as a distribution.

    cDPO of b (sort(D_w) - sort(D_l)), over the batch

    Melnyk et al. 2024, arXiv 2406.05882, unpaired

    Attributes:
        beta: How strongly the policy is held near the reference.
        label_smoothing: e, assumed share of flipped labels.
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    label_smoothing: float = bounded_field(0.0, "[0, 0.5]")
    initial_loss = log(2)

    def __call__(self, logps: PairLogps) -> PairValues:
        """One value per rank; only their sum means something."""
        chosen, rejected = map(sort_ascending, logps.logratios.unbind(-1))
        return smoothed_logistic_loss(self.beta * (chosen - rejected), self.label_smoothing)  # 2406.05882, unpaired

"""Losses that look at each answer on its own, and losses that compare the sorted answers of a whole batch.

Both need the plain log-ratio D: the partition function does not cancel as it does in the difference within a pair, so
no other divergence can replace reverse KL here.
"""

from dataclasses import dataclass
from math import log

import torch.nn.functional as F

from dpo.losses.base import (
    PairLogps,
    PairValues,
    PreferenceLoss,
    bounded_field,
    chosen_minus_rejected,
    smoothed_logistic_loss,
)


@dataclass(frozen=True)
class NCA(PreferenceLoss):
    """Noise Contrastive Alignment for pairs: keeps the likelihood of the chosen answer from falling.

    -log S(b D_w) - 1/2 log S(-b D_w) - 1/2 log S(-b D_l)

    Chen et al. 2024, arXiv 2402.05369, NCA with two answers

    Attributes:
        beta: How strongly the policy is kept close to the reference.

    Example:
        >>> import torch
        >>> from dpo import losses
        >>> policy, reference = torch.tensor([[-10.0], [-14.0]]), torch.tensor([[-12.0], [-12.0]])
        >>> losses.NCA(beta=0.1)(losses.PairLogps.from_sums(*policy, *reference))
        tensor([1.2963])
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    initial_loss = 2 * log(2)

    def __call__(self, logps: PairLogps) -> PairValues:
        """Return the loss of each pair."""
        chosen, rejected = (self.beta * logps.logratios).unbind(-1)
        return -F.logsigmoid(chosen) - (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2  # 2402.05369, NCA, K = 2


@dataclass(frozen=True)
class BCO(PreferenceLoss):
    """Binary Classifier Optimization for pairs, without a reward shift.

    -log S(b D_w) - log S(-b D_l)

    Jung et al. 2024, arXiv 2404.04656, with delta = 0

    Attributes:
        beta: How strongly the policy is kept close to the reference.

    Example:
        >>> import torch
        >>> from dpo import losses
        >>> policy, reference = torch.tensor([[-10.0], [-14.0]]), torch.tensor([[-12.0], [-12.0]])
        >>> losses.BCO(beta=0.1)(losses.PairLogps.from_sums(*policy, *reference))
        tensor([1.1963])
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    initial_loss = 2 * log(2)

    def __call__(self, logps: PairLogps) -> PairValues:
        """Return the loss of each pair."""
        chosen, rejected = (self.beta * logps.logratios).unbind(-1)
        return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)  # 2404.04656, binary cross-entropy, delta = 0


@dataclass(frozen=True)
class SPPO(PreferenceLoss):
    """Self-Play Preference Optimization with hard labels: the log-ratios shall be 1/(2b) and -1/(2b).

    (D_w - 1/(2b))^2 + (D_l + 1/(2b))^2

    Wu et al. 2024, arXiv 2405.00675, equation 4.7, with probability 1 of the chosen answer

    Attributes:
        beta: 1 / eta of the paper.

    Example:
        >>> import torch
        >>> from dpo import losses
        >>> policy, reference = torch.tensor([[-10.0], [-14.0]]), torch.tensor([[-12.0], [-12.0]])
        >>> losses.SPPO(beta=0.1)(losses.PairLogps.from_sums(*policy, *reference))
        tensor([18.])
    """

    beta: float = bounded_field(0.1, "(0, inf)")

    def __call__(self, logps: PairLogps) -> PairValues:
        """Return the loss of each pair."""
        chosen, rejected = logps.logratios.unbind(-1)
        target = 1 / (2 * self.beta)
        return (chosen - target) ** 2 + (rejected + target) ** 2  # 2405.00675 eq. 4.7, P = 1 and 0

    @property
    def initial_loss(self) -> float:
        """The sum of both targets squared."""
        return 1 / (2 * self.beta**2)


@dataclass(frozen=True)
class APOZero(PreferenceLoss):
    """Anchored Preference Optimization, zero: chosen up, rejected down; for answers better than the policy's own.

    1 - S(b D_w) + S(b D_l)

    D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7

    Attributes:
        beta: How strongly the policy is kept close to the reference.

    Example:
        >>> import torch
        >>> from dpo import losses
        >>> policy, reference = torch.tensor([[-10.0], [-14.0]]), torch.tensor([[-12.0], [-12.0]])
        >>> losses.APOZero(beta=0.1)(losses.PairLogps.from_sums(*policy, *reference))
        tensor([0.9003])
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    initial_loss = 1.0

    def __call__(self, logps: PairLogps) -> PairValues:
        """Return the loss of each pair."""
        chosen, rejected = (self.beta * logps.logratios).unbind(-1)
        return (-chosen).sigmoid() + rejected.sigmoid()  # 2408.06266 eq. 7; 1 - S(x) = S(-x)


@dataclass(frozen=True)
class APODown(PreferenceLoss):
    """Anchored Preference Optimization, down: both down, rejected more; for answers worse than the policy's own.

    S(b D_w) + 1 - S(b h)

    D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8

    Attributes:
        beta: How strongly the policy is kept close to the reference.

    Example:
        >>> import torch
        >>> from dpo import losses
        >>> policy, reference = torch.tensor([[-10.0], [-14.0]]), torch.tensor([[-12.0], [-12.0]])
        >>> losses.APODown(beta=0.1)(losses.PairLogps.from_sums(*policy, *reference))
        tensor([0.9511])
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    initial_loss = 1.0

    def __call__(self, logps: PairLogps) -> PairValues:
        """Return the loss of each pair."""
        chosen, rejected = (self.beta * logps.logratios).unbind(-1)
        return chosen.sigmoid() + (rejected - chosen).sigmoid()  # 2408.06266 eq. 8


@dataclass(frozen=True)
class AOT(PreferenceLoss):
    """Alignment via Optimal Transport, paired: the policy's margins dominate the reference's as a distribution.

    cDPO of b (u - v), u = sort(lp_w - lp_l) of the policy, v the same of the reference, over the batch

    Melnyk et al. 2024, arXiv 2406.05882, paired

    Attributes:
        beta: How strongly the policy is kept close to the reference.
        label_smoothing: e, assumed share of flipped labels.

    Example:
        >>> import torch
        >>> from dpo import losses
        >>> policy = torch.tensor([[-10.0, -5.0], [-14.0, -5.0]])  # two pairs
        >>> reference = torch.tensor([[-12.0, -6.0], [-12.0, -5.0]])
        >>> losses.AOT(beta=0.1)(losses.PairLogps.from_sums(*policy, *reference))
        tensor([0.6444, 0.5130])
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    label_smoothing: float = bounded_field(0.0, "[0, 0.5]")
    initial_loss = log(2)
    needs_whole_batch = True

    def __call__(self, logps: PairLogps) -> PairValues:
        """Return one value per rank; only their sum is meaningful."""
        policy = chosen_minus_rejected(logps.policy).sort().values
        reference = chosen_minus_rejected(logps.reference).sort().values
        return smoothed_logistic_loss(self.beta * (policy - reference), self.label_smoothing)  # 2406.05882, paired


@dataclass(frozen=True)
class AOTUnpaired(PreferenceLoss):
    """Alignment via Optimal Transport, unpaired: chosen rewards dominate rejected ones as a distribution.

    cDPO of b (sort(D_w) - sort(D_l)), over the batch

    Melnyk et al. 2024, arXiv 2406.05882, unpaired

    Attributes:
        beta: How strongly the policy is kept close to the reference.
        label_smoothing: e, assumed share of flipped labels.

    Example:
        >>> import torch
        >>> from dpo import losses
        >>> policy = torch.tensor([[-10.0, -5.0], [-14.0, -5.0]])  # two pairs
        >>> reference = torch.tensor([[-12.0, -6.0], [-12.0, -5.0]])
        >>> losses.AOTUnpaired(beta=0.1)(losses.PairLogps.from_sums(*policy, *reference))
        tensor([0.5544, 0.5981])
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    label_smoothing: float = bounded_field(0.0, "[0, 0.5]")
    initial_loss = log(2)
    needs_whole_batch = True

    def __call__(self, logps: PairLogps) -> PairValues:
        """Return one value per rank; only their sum is meaningful."""
        chosen, rejected = (answers.sort().values for answers in logps.logratios.unbind(-1))
        return smoothed_logistic_loss(self.beta * (chosen - rejected), self.label_smoothing)  # 2406.05882, unpaired

"""Losses of one number per pair: beta times the difference between the scores of the two answers.

With reverse KL the score of an answer is its log-ratio D and the difference is h = D_w - D_l. Another `Divergence` may
replace it in these losses only, because here the partition function of the implicit reward cancels.
"""

from dataclasses import dataclass
from math import log

import torch.nn.functional as F
from torch import Tensor

from dpo.losses.base import (
    PairLogps,
    PairValues,
    PreferenceLoss,
    UnknownInitialLoss,
    bounded_field,
    chosen_minus_rejected,
    smoothed_logistic_loss,
)
from dpo.losses.divergences import REVERSE_KL, Divergence


@dataclass(frozen=True)
class DPO(PreferenceLoss):
    """Direct Preference Optimization; with label smoothing, conservative DPO (cDPO).

    -(1-e) log S(b h) - e log S(-b h)

    Rafailov et al. 2023, arXiv 2305.18290, equation 7; e: Mitchell 2023, note on noisy labels, equation 3

    Attributes:
        beta: How strongly the policy is kept close to the reference.
        label_smoothing: e, assumed share of flipped labels.
        divergence: Score of a log-ratio.

    Example:
        >>> import torch
        >>> from dpo import losses
        >>> policy, reference = torch.tensor([[-10.0], [-14.0]]), torch.tensor([[-12.0], [-12.0]])
        >>> losses.DPO(beta=0.1)(losses.PairLogps.from_sums(*policy, *reference))
        tensor([0.5130])
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    label_smoothing: float = bounded_field(0.0, "[0, 0.5]")
    divergence: Divergence = REVERSE_KL
    initial_loss = log(2)

    def __call__(self, logps: PairLogps) -> PairValues:
        """Return the loss of each pair."""
        x = self.beta * chosen_minus_rejected(self.divergence(logps.logratios))
        return smoothed_logistic_loss(x, self.label_smoothing)  # 2305.18290 eq. 7, ericmitchell.ai/cdpo.pdf eq. 3


@dataclass(frozen=True)
class ODPO(PreferenceLoss):
    """DPO with an offset: the better the chosen answer, the larger the difference in reward has to be.

    -log S(b h - m), m the margin that the data give for the pair

    Amini et al. 2024, arXiv 2402.10571, the loss of ODPO

    Attributes:
        beta: How strongly the policy is kept close to the reference.
        divergence: Score of a log-ratio.

    Example:
        >>> from dataclasses import replace
        >>> import torch
        >>> from dpo import losses
        >>> policy, reference = torch.tensor([[-10.0], [-14.0]]), torch.tensor([[-12.0], [-12.0]])
        >>> logps = losses.PairLogps.from_sums(*policy, *reference)
        >>> losses.ODPO(beta=0.1)(replace(logps, margins=torch.tensor([1.0])))
        tensor([1.0375])
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    divergence: Divergence = REVERSE_KL
    initial_loss = UnknownInitialLoss("it depends on the margins of the data")
    uses_margins = True

    def __call__(self, logps: PairLogps) -> PairValues:
        """Return the loss of each pair."""
        margins = 0.0 if logps.margins is None else logps.margins
        h = chosen_minus_rejected(self.divergence(logps.logratios))
        return -F.logsigmoid(self.beta * h - margins)  # 2402.10571, ODPO


@dataclass(frozen=True)
class RobustDPO(PreferenceLoss):
    """Robust DPO: unbiased if labels are flipped at random; it can be negative.

    [-(1-e) log S(b h) + e log S(-b h)] / (1-2e)

    Chowdhury et al. 2024, arXiv 2403.00409, the loss of rDPO

    Attributes:
        beta: How strongly the policy is kept close to the reference.
        label_smoothing: e, assumed share of flipped labels.
        divergence: Score of a log-ratio.

    Example:
        >>> import torch
        >>> from dpo import losses
        >>> policy, reference = torch.tensor([[-10.0], [-14.0]]), torch.tensor([[-12.0], [-12.0]])
        >>> losses.RobustDPO(beta=0.1, label_smoothing=0.2)(losses.PairLogps.from_sums(*policy, *reference))
        tensor([0.3797])
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    label_smoothing: float = bounded_field(0.1, "[0, 0.5)")
    divergence: Divergence = REVERSE_KL
    initial_loss = log(2)

    def __call__(self, logps: PairLogps) -> PairValues:
        """Return the loss of each pair."""
        x = self.beta * chosen_minus_rejected(self.divergence(logps.logratios))
        e = self.label_smoothing
        return (-(1 - e) * F.logsigmoid(x) + e * F.logsigmoid(-x)) / (1 - 2 * e)  # 2403.00409, rDPO


@dataclass(frozen=True)
class IPO(PreferenceLoss):
    """Identity Preference Optimization: squared distance to a margin, per token.

    (D_w/|y_w| - D_l/|y_l| - 1/(2b))^2

    Azar et al. 2023, arXiv 2310.12036, equation 17, with means over tokens, as its authors have confirmed

    Attributes:
        beta: tau of the paper; the margin is 1 / (2 beta).
        divergence: Score of a log-ratio.

    Example:
        >>> import torch
        >>> from dpo import losses
        >>> policy, reference = torch.tensor([[-10.0], [-14.0]]), torch.tensor([[-12.0], [-12.0]])
        >>> logps = losses.PairLogps.from_sums(*policy, *reference, lengths=torch.tensor([[4, 5]]))
        >>> losses.IPO(beta=0.1)(logps)
        tensor([16.8100])
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    divergence: Divergence = REVERSE_KL

    def __call__(self, logps: PairLogps) -> PairValues:
        """Return the loss of each pair."""
        h = chosen_minus_rejected(self.divergence(logps.logratios) / logps.lengths)
        return (h - 1 / (2 * self.beta)) ** 2  # 2310.12036 eq. 17

    @property
    def initial_loss(self) -> float:
        """The margin 1 / (2 beta) squared."""
        return 1 / (4 * self.beta**2)


@dataclass(frozen=True)
class Hinge(PreferenceLoss):
    """The hinge loss of SLiC-HF and RSO.

    max(0, 1 - b h)

    Zhao et al. 2023, arXiv 2305.10425 (SLiC-HF); Liu et al. 2023, arXiv 2309.06657 (RSO)

    Attributes:
        beta: How strongly the policy is kept close to the reference; the margin is 1 / beta.
        divergence: Score of a log-ratio.

    Example:
        >>> import torch
        >>> from dpo import losses
        >>> policy, reference = torch.tensor([[-10.0], [-14.0]]), torch.tensor([[-12.0], [-12.0]])
        >>> losses.Hinge(beta=0.1)(losses.PairLogps.from_sums(*policy, *reference))
        tensor([0.6000])
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    divergence: Divergence = REVERSE_KL
    initial_loss = 1.0

    def __call__(self, logps: PairLogps) -> PairValues:
        """Return the loss of each pair."""
        return F.relu(1 - self.beta * chosen_minus_rejected(self.divergence(logps.logratios)))  # 2309.06657, hinge-norm


@dataclass(frozen=True)
class EXO(PreferenceLoss):
    """Efficient Exact Optimization for pairs: KL from the policy's preference q to the smoothed label.

    q (log q - log(1-e)) + (1-q) (log(1-q) - log e), q = S(b h)

    Ji et al. 2024, arXiv 2402.00856, equation 16

    Attributes:
        beta: How strongly the policy is kept close to the reference.
        label_smoothing: e, probability that the smoothed label gives to the rejected answer.
        divergence: Score of a log-ratio.

    Example:
        >>> import torch
        >>> from dpo import losses
        >>> policy, reference = torch.tensor([[-10.0], [-14.0]]), torch.tensor([[-12.0], [-12.0]])
        >>> losses.EXO(beta=0.1)(losses.PairLogps.from_sums(*policy, *reference))
        tensor([2.0992])
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    label_smoothing: float = bounded_field(1e-3, "(0, 0.5]")
    divergence: Divergence = REVERSE_KL

    def __call__(self, logps: PairLogps) -> PairValues:
        """Return the loss of each pair."""
        x = self.beta * chosen_minus_rejected(self.divergence(logps.logratios))
        return self._kl_term(x, 1 - self.label_smoothing) + self._kl_term(-x, self.label_smoothing)  # 2402.00856 eq. 16

    def _kl_term(self, x: Tensor, label: float) -> Tensor:
        return x.sigmoid() * (F.logsigmoid(x) - log(label))

    @property
    def initial_loss(self) -> float:
        """The KL divergence at q = 1/2."""
        return -log(2) - (log(1 - self.label_smoothing) + log(self.label_smoothing)) / 2


@dataclass(frozen=True)
class DiscoPOP(PreferenceLoss):
    """A loss discovered by search: logistic for wrongly ranked pairs, exponential for correctly ranked ones.

    (1-m) (-log S(b h)) + m exp(-b h), m = S(b h / tau)

    Lu et al. 2024, arXiv 2406.08414, equation 5

    Attributes:
        beta: How strongly the policy is kept close to the reference.
        tau: Width of the transition between the two parts.
        divergence: Score of a log-ratio.

    Example:
        >>> import torch
        >>> from dpo import losses
        >>> policy, reference = torch.tensor([[-10.0], [-14.0]]), torch.tensor([[-12.0], [-12.0]])
        >>> losses.DiscoPOP(beta=0.05)(losses.PairLogps.from_sums(*policy, *reference))
        tensor([0.8148])
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    tau: float = bounded_field(0.05, "(0, 1]")
    divergence: Divergence = REVERSE_KL
    initial_loss = (log(2) + 1) / 2

    def __call__(self, logps: PairLogps) -> PairValues:
        """Return the loss of each pair."""
        x = self.beta * chosen_minus_rejected(self.divergence(logps.logratios))
        exponential = (F.logsigmoid(x / self.tau) - x).exp()  # m exp(-x) as one exponent, which tau <= 1 keeps small
        return (-x / self.tau).sigmoid() * -F.logsigmoid(x) + exponential  # 2406.08414 eq. 5


@dataclass(frozen=True)
class LengthNormalizedDPO(PreferenceLoss):
    """DPO on log-ratios per token, so that length earns no reward.

    -log S(b (D_w/|y_w| - D_l/|y_l|))

    Lambert et al. 2024 (Tulu 3), arXiv 2411.15124, its length-normalised DPO

    Attributes:
        beta: How strongly the policy is kept close to the reference; values of 5 and more are usual.
        divergence: Score of a log-ratio.

    Example:
        >>> import torch
        >>> from dpo import losses
        >>> policy, reference = torch.tensor([[-10.0], [-14.0]]), torch.tensor([[-12.0], [-12.0]])
        >>> logps = losses.PairLogps.from_sums(*policy, *reference, lengths=torch.tensor([[4, 5]]))
        >>> losses.LengthNormalizedDPO(beta=5.0)(logps)
        tensor([0.0110])
    """

    beta: float = bounded_field(5.0, "(0, inf)")
    divergence: Divergence = REVERSE_KL
    initial_loss = log(2)

    def __call__(self, logps: PairLogps) -> PairValues:
        """Return the loss of each pair."""
        h = chosen_minus_rejected(self.divergence(logps.logratios) / logps.lengths)
        return -F.logsigmoid(self.beta * h)  # 2411.15124, length-normalised DPO

"""Losses of one number per pair: beta times the difference of the scores of both answers.

With reverse KL the score of an answer is its log-ratio D and the difference is h = D_w - D_l; another `Divergence`
replaces it, which is sound here alone, where the partition function of the implicit reward cancels.
"""

from dataclasses import dataclass
from math import log

import torch.nn.functional as F
from torch import Tensor

from dpo.losses.base import (
    PairLogps,
    PairLoss,
    PairValues,
    UnknownInitialLoss,
    bounded_field,
    chosen_minus_rejected,
    smoothed_logistic_loss,
)
from dpo.losses.divergences import REVERSE_KL, Divergence


@dataclass(frozen=True)
class DPO(PairLoss):
    """Direct Preference Optimization; with label smoothing the conservative DPO (cDPO).

    -(1-e) log S(b h) - e log S(-b h)

    Rafailov et al. 2023, arXiv 2305.18290, equation 7; e: Mitchell 2023, note on noisy labels, equation 3

    Attributes:
        beta: How strongly the policy is held near the reference.
        label_smoothing: e, assumed share of flipped labels.
        divergence: Score of a log-ratio.
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    label_smoothing: float = bounded_field(0.0, "[0, 0.5]")
    divergence: Divergence = REVERSE_KL
    initial_loss = log(2)

    def __call__(self, logps: PairLogps) -> PairValues:
        """The loss of each pair."""
        h = chosen_minus_rejected(self.divergence(logps.logratios))
        return smoothed_logistic_loss(
            self.beta * h, self.label_smoothing
        )  # 2305.18290 eq. 7; e > 0: ericmitchell.ai/cdpo.pdf eq. 3


@dataclass(frozen=True)
class ODPO(PairLoss):
    """DPO with an offset: the better the chosen answer, the further the two shall be apart.

    -log S(b h - m), m the margin that the data give for the pair

    Amini et al. 2024, arXiv 2402.10571, the loss of ODPO

    Attributes:
        beta: How strongly the policy is held near the reference.
        divergence: Score of a log-ratio.
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    divergence: Divergence = REVERSE_KL
    initial_loss = UnknownInitialLoss("it depends on the margins of the data")
    uses_margins = True

    def __call__(self, logps: PairLogps) -> PairValues:
        """The loss of each pair."""
        margins = 0.0 if logps.margins is None else logps.margins
        return -F.logsigmoid(
            self.beta * chosen_minus_rejected(self.divergence(logps.logratios)) - margins
        )  # 2402.10571, ODPO


@dataclass(frozen=True)
class RobustDPO(PairLoss):
    """Robust DPO: unbiased under random label flips; may be negative.

    [-(1-e) log S(b h) + e log S(-b h)] / (1-2e)

    Chowdhury et al. 2024, arXiv 2403.00409, the loss of rDPO

    Attributes:
        beta: How strongly the policy is held near the reference.
        label_smoothing: e, assumed share of flipped labels.
        divergence: Score of a log-ratio.
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    label_smoothing: float = bounded_field(0.1, "[0, 0.5)")
    divergence: Divergence = REVERSE_KL
    initial_loss = log(2)

    def __call__(self, logps: PairLogps) -> PairValues:
        """The loss of each pair."""
        x, e = self.beta * chosen_minus_rejected(self.divergence(logps.logratios)), self.label_smoothing
        return (-(1 - e) * F.logsigmoid(x) + e * F.logsigmoid(-x)) / (1 - 2 * e)  # 2403.00409, rDPO


@dataclass(frozen=True)
class IPO(PairLoss):
    """Identity Preference Optimization: a squared distance to a margin, per token.

    (D_w/|y_w| - D_l/|y_l| - 1/(2b))^2

    Azar et al. 2023, arXiv 2310.12036, equation 17, with means over tokens, as its authors have confirmed

    Attributes:
        beta: tau of the paper; the margin is 1 / (2 beta).
        divergence: Score of a log-ratio.
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    divergence: Divergence = REVERSE_KL

    def __call__(self, logps: PairLogps) -> PairValues:
        """The loss of each pair."""
        h = chosen_minus_rejected(self.divergence(logps.logratios) / logps.lengths)
        return (h - 1 / (2 * self.beta)) ** 2  # 2310.12036 eq. 17

    @property
    def initial_loss(self) -> float:
        """The squared margin."""
        return 1 / (4 * self.beta**2)


@dataclass(frozen=True)
class Hinge(PairLoss):
    """The hinge of SLiC-HF and RSO.

    max(0, 1 - b h)

    Zhao et al. 2023, arXiv 2305.10425 (SLiC-HF); Liu et al. 2023, arXiv 2309.06657 (RSO)

    Attributes:
        beta: How strongly the policy is held near the reference; the margin is 1 / beta.
        divergence: Score of a log-ratio.
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    divergence: Divergence = REVERSE_KL
    initial_loss = 1.0

    def __call__(self, logps: PairLogps) -> PairValues:
        """The loss of each pair."""
        return F.relu(1 - self.beta * chosen_minus_rejected(self.divergence(logps.logratios)))  # 2309.06657, hinge-norm


@dataclass(frozen=True)
class EXO(PairLoss):
    """Efficient Exact Optimization for pairs: KL from the policy's preference q to the smoothed label.

    q (log q - log(1-e)) + (1-q) (log(1-q) - log e), q = S(b h)

    Ji et al. 2024, arXiv 2402.00856, equation 16

    Attributes:
        beta: How strongly the policy is held near the reference.
        label_smoothing: e, share of the label that the rejected answer keeps.
        divergence: Score of a log-ratio.
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    label_smoothing: float = bounded_field(1e-3, "(0, 0.5]")
    divergence: Divergence = REVERSE_KL

    def __call__(self, logps: PairLogps) -> PairValues:
        """The loss of each pair."""
        x = self.beta * chosen_minus_rejected(self.divergence(logps.logratios))
        return self._part(x, 1 - self.label_smoothing) + self._part(-x, self.label_smoothing)  # 2402.00856 eq. 16

    def _part(self, x: Tensor, label: float) -> Tensor:
        return x.sigmoid() * (F.logsigmoid(x) - log(label))

    @property
    def initial_loss(self) -> float:
        """q = 1/2."""
        return -log(2) - (log(1 - self.label_smoothing) + log(self.label_smoothing)) / 2


@dataclass(frozen=True)
class DiscoPOP(PairLoss):
    """A loss found by search: logistic where the pair is wrong, exponential where it is right.

    (1-m) (-log S(b h)) + m exp(-b h), m = S(b h / tau)

    Lu et al. 2024, arXiv 2406.08414, equation 5

    Attributes:
        beta: How strongly the policy is held near the reference.
        tau: Width of the transition between both parts.
        divergence: Score of a log-ratio.
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    tau: float = bounded_field(0.05, "(0, 1]")
    divergence: Divergence = REVERSE_KL
    initial_loss = (log(2) + 1) / 2

    def __call__(self, logps: PairLogps) -> PairValues:
        """The loss of each pair."""
        x = self.beta * chosen_minus_rejected(self.divergence(logps.logratios))
        exponential = (F.logsigmoid(x / self.tau) - x).exp()  # m exp(-x) in one exponent, which tau <= 1 keeps small
        return (-x / self.tau).sigmoid() * -F.logsigmoid(x) + exponential  # 2406.08414 eq. 5


@dataclass(frozen=True)
class LengthNormalizedDPO(PairLoss):
    """DPO on log-ratios per token, so that length earns nothing.

    -log S(b (D_w/|y_w| - D_l/|y_l|))

    Lambert et al. 2024 (Tulu 3), arXiv 2411.15124, its length-normalised DPO

    Attributes:
        beta: How strongly the policy is held near the reference; values of 5 and more are usual.
        divergence: Score of a log-ratio.
    """

    beta: float = bounded_field(5.0, "(0, inf)")
    divergence: Divergence = REVERSE_KL
    initial_loss = log(2)

    def __call__(self, logps: PairLogps) -> PairValues:
        """The loss of each pair."""
        h = chosen_minus_rejected(self.divergence(logps.logratios) / logps.lengths)
        return -F.logsigmoid(self.beta * h)  # 2411.15124, length-normalised DPO

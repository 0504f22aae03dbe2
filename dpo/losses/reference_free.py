"""Losses without a reference: they use only the policy's log-probabilities.

Their value at the start is not a known constant, and their rewards are log-probabilities: comparable between the two
answers of a pair, but not between runs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dpo.losses.base import (
    AnswerValues,
    PairLogps,
    PairValues,
    PolicyLoss,
    bounded_field,
    chosen_minus_rejected,
    smoothed_logistic_loss,
)

MAX_LOG_PROBABILITY = -torch.finfo(torch.float32).eps  # the odds of probability 1 are infinite


def chosen_nll(logps: PairLogps) -> PairValues:
    """Return -lp_w / |y_w|: negative log-likelihood per token of the chosen answer, nats."""
    return -logps.mean_token_logps[:, 0]


@dataclass(frozen=True)
class NLL(PolicyLoss):
    """Negative log-likelihood of the chosen answer, the supervised term of RPO and MPO (in a weighted `Sum`).

    -lp_w / |y_w|

    Pang et al. 2024, arXiv 2404.19733, equation 1 (RPO); Wang et al. 2024, arXiv 2411.10442 (MPO)

    Example:
        >>> import torch
        >>> from dpo import losses
        >>> policy = torch.tensor([[-10.0], [-14.0]])
        >>> losses.NLL()(losses.PairLogps.from_sums(*policy, lengths=torch.tensor([[4, 5]])))
        tensor([2.5000])
    """

    def __call__(self, logps: PairLogps) -> PairValues:
        """Return the loss of each pair; every answer has the same weight, however long it is."""
        return chosen_nll(logps)  # 2404.19733 eq. 1, second term

    def rewards(self, logps: PairLogps) -> AnswerValues:
        """Return r = lp / |y| of each answer, without a gradient."""
        return logps.mean_token_logps.detach()


@dataclass(frozen=True)
class SimPO(PolicyLoss):
    """Simple Preference Optimization: rewards are log-probabilities per token, with a margin.

    -log S(b (lp_w/|y_w| - lp_l/|y_l|) - gamma)

    Meng et al. 2024, arXiv 2405.14734, equation 6

    Attributes:
        beta: Scale of the rewards.
        gamma: Margin by which the reward of the chosen answer shall be higher.

    Example:
        >>> import torch
        >>> from dpo import losses
        >>> policy = torch.tensor([[-10.0], [-14.0]])
        >>> logps = losses.PairLogps.from_sums(*policy, lengths=torch.tensor([[4, 5]]))
        >>> losses.SimPO(beta=2.0, gamma=1.0)(logps)
        tensor([0.9130])
    """

    beta: float = bounded_field(2.0, "(0, inf)")
    gamma: float = bounded_field(1.0, "[0, inf)")

    def __call__(self, logps: PairLogps) -> PairValues:
        """Return the loss of each pair."""
        return -F.logsigmoid(self.beta * chosen_minus_rejected(logps.mean_token_logps) - self.gamma)  # 2405.14734 eq. 6


@dataclass(frozen=True)
class CPO(PolicyLoss):
    """Contrastive Preference Optimization: DPO with a uniform reference, plus the likelihood of the chosen answer.

    -(1-e) log S(b (lp_w - lp_l)) - e log S(-b (lp_w - lp_l)) - alpha lp_w/|y_w|

    Xu et al. 2024, arXiv 2401.08417, equation 3 and the likelihood term beside it (here per token)

    Attributes:
        beta: Scale of the rewards.
        alpha: Weight of the likelihood term.
        label_smoothing: e, assumed share of flipped labels.

    Example:
        >>> import torch
        >>> from dpo import losses
        >>> policy = torch.tensor([[-10.0], [-14.0]])
        >>> logps = losses.PairLogps.from_sums(*policy, lengths=torch.tensor([[4, 5]]))
        >>> losses.CPO(beta=0.1, alpha=1.0)(logps)
        tensor([3.0130])
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    alpha: float = bounded_field(1.0, "[0, inf)")
    label_smoothing: float = bounded_field(0.0, "[0, 0.5]")

    def __call__(self, logps: PairLogps) -> PairValues:
        """Return the loss of each pair."""
        x = self.beta * chosen_minus_rejected(logps.policy)
        return smoothed_logistic_loss(x, self.label_smoothing) + self.alpha * chosen_nll(logps)  # 2401.08417 eq. 3

    def rewards(self, logps: PairLogps) -> AnswerValues:
        """Return r = beta lp of each answer, without a gradient."""
        return self.beta * logps.policy.detach()


@dataclass(frozen=True)
class ORPO(PolicyLoss):
    """Odds Ratio Preference Optimization: likelihood of the chosen answer and its odds against the rejected one.

    -n_w - b log S(log odds_w - log odds_l), log odds = n - log(1 - exp(n)), n = lp/|y|

    Hong et al. 2024, arXiv 2403.07691, equations 4, 6 and 7

    Attributes:
        beta: lambda of the paper, weight of the odds ratio.

    Example:
        >>> import torch
        >>> from dpo import losses
        >>> policy = torch.tensor([[-10.0], [-14.0]])
        >>> losses.ORPO(beta=0.1)(losses.PairLogps.from_sums(*policy, lengths=torch.tensor([[4, 5]])))
        tensor([2.5545])
    """

    beta: float = bounded_field(0.1, "(0, inf)")

    def __call__(self, logps: PairLogps) -> PairValues:
        """Return the loss of each pair."""
        n = logps.mean_token_logps.clamp(max=MAX_LOG_PROBABILITY)
        log_odds = n - (-n.expm1()).log()  # 2403.07691 eq. 4
        return chosen_nll(logps) - self.beta * F.logsigmoid(chosen_minus_rejected(log_odds))  # 2403.07691 eq. 6 and 7

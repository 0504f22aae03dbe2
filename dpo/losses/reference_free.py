"""Losses without a reference: of the policy's log-probabilities alone.

None of them has a constant at the start, and their rewards are log-probabilities: comparable between the two answers of
a pair, not between runs.
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

MAX_LOG_PROBABILITY = -torch.finfo(torch.float32).eps  # log of the largest probability whose odds are taken: 1 has none


def chosen_nll(logps: PairLogps) -> PairValues:
    """-lp_w / |y_w|: negative log-likelihood of a token of the chosen answer, nats."""
    return -logps.mean_token_logps[:, 0]


@dataclass(frozen=True)
class NLL(PolicyLoss):
    """The supervised term: with weights in a `Sum` that of RPO and MPO.

    -lp_w / |y_w|

    Pang et al. 2024, arXiv 2404.19733, equation 1 (RPO); Wang et al. 2024, arXiv 2411.10442 (MPO)
    """

    def __call__(self, logps: PairLogps) -> PairValues:
        """The loss of each pair: every answer weighs the same, however long."""
        return chosen_nll(logps)  # 2404.19733 eq. 1, second term

    def rewards(self, logps: PairLogps) -> AnswerValues:
        """lp / |y|."""
        return logps.mean_token_logps.detach()


@dataclass(frozen=True)
class SimPO(PolicyLoss):
    """Simple Preference Optimization: log-probabilities per token as rewards, with a margin.

    -log S(b (lp_w/|y_w| - lp_l/|y_l|) - gamma)

    Meng et al. 2024, arXiv 2405.14734, equation 6

    Attributes:
        beta: Scale of the rewards.
        gamma: Margin that the reward of the chosen answer has to gain.
    """

    beta: float = bounded_field(2.0, "(0, inf)")
    gamma: float = bounded_field(1.0, "[0, inf)")

    def __call__(self, logps: PairLogps) -> PairValues:
        """The loss of each pair."""
        return -F.logsigmoid(self.beta * chosen_minus_rejected(logps.mean_token_logps) - self.gamma)  # 2405.14734 eq. 6

    def rewards(self, logps: PairLogps) -> AnswerValues:
        """b lp / |y|."""
        return self.beta * logps.mean_token_logps.detach()


@dataclass(frozen=True)
class CPO(PolicyLoss):
    """Contrastive Preference Optimization: DPO with a uniform reference, and the likelihood of the chosen answer.

    -(1-e) log S(b (lp_w - lp_l)) - e log S(-b (lp_w - lp_l)) - alpha lp_w/|y_w|

    Xu et al. 2024, arXiv 2401.08417, equation 3 and the likelihood term beside it (here per token)

    Attributes:
        beta: Scale of the rewards.
        alpha: Weight of the likelihood term.
        label_smoothing: e, assumed share of flipped labels.
    """

    beta: float = bounded_field(0.1, "(0, inf)")
    alpha: float = bounded_field(1.0, "[0, inf)")
    label_smoothing: float = bounded_field(0.0, "[0, 0.5]")

    def __call__(self, logps: PairLogps) -> PairValues:
        """The loss of each pair."""
        prefer = smoothed_logistic_loss(
            self.beta * chosen_minus_rejected(logps.policy), self.label_smoothing
        )  # 2401.08417 eq. 3
        return prefer + self.alpha * chosen_nll(logps)

    def rewards(self, logps: PairLogps) -> AnswerValues:
        """b lp."""
        return self.beta * logps.policy.detach()


@dataclass(frozen=True)
class ORPO(PolicyLoss):
    """Odds Ratio Preference Optimization: likelihood of the chosen answer and the odds against the rejected one.

    -n_w - b log S(log odds_w - log odds_l), log odds = n - log(1 - exp(n)), n = lp/|y|

    Hong et al. 2024, arXiv 2403.07691, equations 4, 6 and 7

    Attributes:
        beta: lambda of the paper, weight of the odds ratio.
    """

    beta: float = bounded_field(0.1, "(0, inf)")

    def __call__(self, logps: PairLogps) -> PairValues:
        """The loss of each pair."""
        n = logps.mean_token_logps.clamp(max=MAX_LOG_PROBABILITY)
        log_odds = n - (-n.expm1()).log()  # 2403.07691 eq. 4
        return chosen_nll(logps) - self.beta * F.logsigmoid(chosen_minus_rejected(log_odds))  # 2403.07691 eq. 6 and 7

    def rewards(self, logps: PairLogps) -> AnswerValues:
        """b lp / |y|."""
        return self.beta * logps.mean_token_logps.detach()

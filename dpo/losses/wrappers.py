"""Losses around losses: a sum of several, less weight for tokens beyond the other answer's length, weights of pairs.

They nest in any order; what each says of itself (reference, constant at the start) follows from what is inside.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from dpo.losses.base import AnswerValues, PairLogps, PairValues, PreferenceLoss, UnknownInitialLoss, bounded_field


@dataclass(frozen=True)
class Sum(PreferenceLoss):
    """A weighted sum of losses: MPO, RPO and whatever else.

    weight_1 loss_1 + weight_2 loss_2 + ...

    Wang et al. 2024, arXiv 2411.10442 (MPO)

    Attributes:
        losses: Any losses; the rewards are those of the first one that uses a reference, or else of the first.
        weights: One above 0 for each.
    """

    losses: tuple[PreferenceLoss, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the weights.

        Raises:
            ValueError: There are no losses, or not as many weights, or one that is not a number above 0.
        """
        sound = all(0 < weight < float("inf") for weight in self.weights)
        if not sound or not self.losses or len(self.losses) != len(self.weights):
            raise ValueError(
                "Sum: expected at least one loss and one weight above 0 for each, got the losses "
                f"{[type(loss).__name__ for loss in self.losses]} and the weights {list(self.weights)}."
            )

    def __call__(self, logps: PairLogps) -> PairValues:
        """The loss of each pair."""
        terms = [weight * loss(logps) for loss, weight in zip(self.losses, self.weights, strict=True)]
        return torch.stack(terms).sum(0)  # 2411.10442, the weighted sum of preference, quality and generation losses

    def rewards(self, logps: PairLogps) -> AnswerValues:
        """Those of the first loss that uses a reference, or else of the first."""
        return next((loss for loss in self.losses if loss.uses_reference), self.losses[0]).rewards(logps)

    @property
    def initial_loss(self) -> float | UnknownInitialLoss:
        """The sum of the constants, if every loss has one."""
        total = 0.0
        for loss, weight in zip(self.losses, self.weights, strict=True):
            start = loss.initial_loss
            if isinstance(start, UnknownInitialLoss):
                return start
            total += weight * start
        return total

    @property
    def uses_reference(self) -> bool:
        """Whether any loss does."""
        return any(loss.uses_reference for loss in self.losses)

    @property
    def uses_margins(self) -> bool:
        """Whether any loss does."""
        return any(loss.uses_margins for loss in self.losses)

    @property
    def needs_whole_batch(self) -> bool:
        """Whether any loss does."""
        return any(loss.needs_whole_batch for loss in self.losses)


class LossModifier(PreferenceLoss):
    """A loss around one other."""

    loss: PreferenceLoss

    @property
    def uses_reference(self) -> bool:
        """As the loss inside."""
        return self.loss.uses_reference

    @property
    def uses_margins(self) -> bool:
        """As the loss inside."""
        return self.loss.uses_margins

    @property
    def needs_whole_batch(self) -> bool:
        """As the loss inside."""
        return self.loss.needs_whole_batch


@dataclass(frozen=True)
class LD(LossModifier):
    """Length desensitization (LD-DPO): tokens beyond the length of the shorter answer weigh less.

    the loss inside, with lp = sum of the first min(|y_w|, |y_l|) tokens + alpha * sum of the rest, under both models

    Liu et al. 2024, arXiv 2409.06411

    Attributes:
        loss: Any loss.
        alpha: Weight of the tokens beyond; 1 changes nothing.
    """

    loss: PreferenceLoss
    alpha: float = bounded_field(0.5, "[0, 1]")

    def __call__(self, logps: PairLogps) -> PairValues:
        """The loss of each pair."""
        return self.loss(self._weighed(logps))

    def rewards(self, logps: PairLogps) -> AnswerValues:
        """Those of the loss inside, with the same weights."""
        return self.loss.rewards(self._weighed(logps))

    @property
    def initial_loss(self) -> float | UnknownInitialLoss:
        """As the loss inside: log-ratios of 0 stay 0."""
        return self.loss.initial_loss

    def _weighed(self, logps: PairLogps) -> PairLogps:
        weights = torch.where(beyond_shorter_answer(logps), self.alpha, 1.0)
        policy, reference = weights * logps.policy_token_logps, weights * logps.reference_token_logps  # 2409.06411
        return replace(logps, policy_token_logps=policy, reference_token_logps=reference)


def beyond_shorter_answer(logps: PairLogps) -> Bool[Tensor, " scored"]:
    """Which tokens stand behind as many tokens as the shorter answer of their pair has."""
    lengths = torch.tensor(logps.answer_lengths, device=logps.policy_token_logps.device)
    shorter = lengths.reshape(-1, 2).amin(1).repeat_interleave(2)
    starts = lengths.cumsum(0) - lengths
    ends, total = starts + shorter, len(logps.policy_token_logps)
    index = torch.arange(total, device=ends.device)
    return index >= ends.repeat_interleave(lengths, output_size=total)


@dataclass(frozen=True)
class WPO(LossModifier):
    """Weighted Preference Optimization: pairs weigh by how likely the policy itself would give both answers.

    the loss inside times w_w * w_l, w = exp(mean over tokens of [log p - log sum_v p_v^2]), without a gradient

    Zhou et al. 2024, arXiv 2406.11827, equation 2

    Attributes:
        loss: A loss of single pairs.
    """

    loss: PreferenceLoss

    def __post_init__(self) -> None:
        """Check the loss.

        Raises:
            ValueError: It sorts the batch, so that its values are not those of pairs.
        """
        if self.loss.needs_whole_batch:
            raise ValueError(
                f"WPO weighs single pairs, and {self.loss} has no values of single pairs: "
                "choose any loss but AOT and AOTUnpaired inside."
            )

    def __call__(self, logps: PairLogps) -> PairValues:
        """The loss of each pair."""
        weights = (logps.answer_sums(logps.on_policy_log_weights) / logps.lengths).exp()  # 2406.11827 eq. 2
        return self.loss(logps) * weights.prod(-1)

    def rewards(self, logps: PairLogps) -> AnswerValues:
        """Those of the loss inside."""
        return self.loss.rewards(logps)

    @property
    def initial_loss(self) -> UnknownInitialLoss:
        """The weights are the policy's own."""
        return UnknownInitialLoss("WPO weighs every pair by how likely the policy gives its answers")

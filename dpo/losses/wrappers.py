"""Losses made of other losses: weighted sums, a lower weight for the tail of longer answers, and weights of pairs.

They can be nested in any order; what each uses (reference, margins, the whole batch) follows from the losses inside.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from dpo.losses.base import AnswerValues, PairLogps, PairValues, PreferenceLoss, UnknownInitialLoss, bounded_field


class LossModifier(PreferenceLoss):
    """Base class of losses made of other losses, which by default is one: the field `loss`.

    The rewards are those of the first inner loss that uses a reference, or else of the first.
    """

    loss: PreferenceLoss

    @property
    def inner_losses(self) -> tuple[PreferenceLoss, ...]:
        """The losses that this one is made of."""
        return (self.loss,)

    @property
    def _reward_loss(self) -> PreferenceLoss:
        return next((loss for loss in self.inner_losses if loss.uses_reference), self.inner_losses[0])

    def rewards(self, logps: PairLogps) -> AnswerValues:
        """Return the rewards of the inner loss."""
        return self._reward_loss.rewards(logps)

    @property
    def reward_scale(self) -> float:
        """Reward scale of the loss that gives the rewards."""
        return self._reward_loss.reward_scale

    @property
    def uses_reference(self) -> bool:
        """Whether any inner loss uses the reference."""
        return any(loss.uses_reference for loss in self.inner_losses)

    @property
    def uses_margins(self) -> bool:
        """Whether any inner loss uses margins."""
        return any(loss.uses_margins for loss in self.inner_losses)

    @property
    def needs_whole_batch(self) -> bool:
        """Whether any inner loss needs the whole batch."""
        return any(loss.needs_whole_batch for loss in self.inner_losses)


@dataclass(frozen=True)
class Sum(LossModifier):
    """A weighted sum of losses, such as MPO or RPO.

    weight_1 loss_1 + weight_2 loss_2 + ...

    Wang et al. 2024, arXiv 2411.10442 (MPO)

    Attributes:
        losses: Any losses; the rewards are those of the first one that uses a reference, or else of the first.
        weights: One above 0 for each loss.

    Example:
        >>> import torch
        >>> from dpo import losses
        >>> policy, reference = torch.tensor([[-10.0], [-14.0]]), torch.tensor([[-12.0], [-12.0]])
        >>> logps = losses.PairLogps.from_sums(*policy, *reference, lengths=torch.tensor([[4, 5]]))
        >>> losses.Sum((losses.DPO(beta=0.1), losses.NLL()), (1.0, 0.5))(logps)
        tensor([1.7630])
    """

    losses: tuple[PreferenceLoss, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check that there are losses, and one positive weight for each.

        Raises:
            ValueError: There is no loss, the number of weights differs, or a weight is not a finite number above 0.
        """
        valid_weights = all(0 < weight < float("inf") for weight in self.weights)
        if not valid_weights or not self.losses or len(self.losses) != len(self.weights):
            raise ValueError(
                "Sum: expected at least one loss and one weight above 0 for each, got the losses "
                f"{[type(loss).__name__ for loss in self.losses]} and the weights {list(self.weights)}."
            )

    @property
    def inner_losses(self) -> tuple[PreferenceLoss, ...]:
        """The losses that are added up."""
        return self.losses

    def __call__(self, logps: PairLogps) -> PairValues:
        """Return the loss of each pair."""
        terms = [weight * loss(logps) for loss, weight in zip(self.losses, self.weights, strict=True)]
        return torch.stack(terms).sum(0)  # 2411.10442, the weighted sum of preference, quality and generation losses

    @property
    def initial_loss(self) -> float | UnknownInitialLoss:
        """Weighted sum of the initial losses, if all are known."""
        total = 0.0
        for loss, weight in zip(self.losses, self.weights, strict=True):
            initial = loss.initial_loss
            if isinstance(initial, UnknownInitialLoss):
                return initial
            total += weight * initial
        return total


@dataclass(frozen=True)
class LD(LossModifier):
    """Length desensitization (LD-DPO): tokens beyond the length of the shorter answer have a lower weight.

    the loss inside, with lp = sum of the first min(|y_w|, |y_l|) tokens + alpha * sum of the rest, under both models

    Liu et al. 2024, arXiv 2409.06411

    Attributes:
        loss: Any loss.
        alpha: Weight of the tokens beyond; 1 changes nothing.

    Example:
        >>> import torch
        >>> from dpo import losses
        >>> logps = losses.PairLogps(
        ...     policy_token_logps=torch.tensor([-1.0, -2.0, -3.0]),
        ...     reference_token_logps=torch.tensor([-1.5, -1.5, -1.0]),
        ...     on_policy_log_weights=torch.zeros(3),
        ...     answer_lengths=(1, 2),
        ... )
        >>> losses.LD(losses.DPO(beta=0.1), alpha=0.5)(logps)
        tensor([0.5981])
    """

    loss: PreferenceLoss
    alpha: float = bounded_field(0.5, "[0, 1]")

    def __call__(self, logps: PairLogps) -> PairValues:
        """Return the loss of each pair."""
        return self.loss(self._weighted(logps))

    def rewards(self, logps: PairLogps) -> AnswerValues:
        """Return the rewards of the inner loss, computed with the same token weights."""
        return self.loss.rewards(self._weighted(logps))

    @property
    def initial_loss(self) -> float | UnknownInitialLoss:
        """Initial loss of the inner loss: weights leave log-ratios of 0 at 0."""
        return self.loss.initial_loss

    def _weighted(self, logps: PairLogps) -> PairLogps:
        logps.require_token_values(self)
        weights = torch.where(beyond_shorter_answer(logps), self.alpha, 1.0)  # 2409.06411
        return replace(
            logps,
            policy_token_logps=weights * logps.policy_token_logps,
            reference_token_logps=weights * logps.reference_token_logps,
        )


def beyond_shorter_answer(logps: PairLogps) -> Bool[Tensor, " scored"]:
    """Return which tokens of each answer lie beyond the length of the shorter answer of its pair."""
    lengths = torch.tensor(logps.answer_lengths, device=logps.policy_token_logps.device)
    shorter = lengths.reshape(-1, 2).amin(1).repeat_interleave(2)
    starts = lengths.cumsum(0) - lengths
    total = len(logps.policy_token_logps)
    index = torch.arange(total, device=lengths.device)
    return index >= (starts + shorter).repeat_interleave(lengths, output_size=total)


@dataclass(frozen=True)
class WPO(LossModifier):
    """Weighted Preference Optimization: pairs are weighted by how likely the policy itself is to give both answers.

    the loss inside times w_w * w_l, w = exp(mean over tokens of [log p - log sum_v p_v^2]), without a gradient

    Zhou et al. 2024, arXiv 2406.11827, equation 2

    Attributes:
        loss: Any loss that gives one value per pair, so not AOT or AOTUnpaired.

    Example:
        >>> import torch
        >>> from dpo import losses
        >>> logps = losses.PairLogps(
        ...     policy_token_logps=torch.tensor([-1.0, -2.0, -3.0]),
        ...     reference_token_logps=torch.tensor([-1.5, -1.5, -1.0]),
        ...     on_policy_log_weights=torch.tensor([-0.1, -0.2, -0.4]),
        ...     answer_lengths=(1, 2),
        ... )
        >>> losses.WPO(losses.DPO(beta=0.1))(logps)
        tensor([0.3716])
    """

    loss: PreferenceLoss
    initial_loss = UnknownInitialLoss("WPO weighs every pair by how likely the policy gives its answers")

    def __post_init__(self) -> None:
        """Check that the inner loss gives one value per pair.

        Raises:
            ValueError: The inner loss sorts the batch, so its values do not belong to pairs.
        """
        if self.loss.needs_whole_batch:
            raise ValueError(
                f"WPO weighs single pairs, but the values of {self.loss} do not belong to single pairs: "
                "use any loss but AOT and AOTUnpaired."
            )

    def __call__(self, logps: PairLogps) -> PairValues:
        """Return the loss of each pair."""
        logps.require_token_values(self)
        weights = (logps.answer_sums(logps.on_policy_log_weights) / logps.lengths).exp()  # 2406.11827 eq. 2
        return self.loss(logps) * weights.prod(-1)

"""What a loss is given, what it says of itself, and the parts that several of them share.

Takes log-probabilities per scored token, gives sums and log-ratios of pairs. No paper's equation stands here.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def sum_per_answer(values: Float[Tensor, " scored"], lengths: Sequence[int]) -> Float[Tensor, " answers"]:
    """Sum per-token values over answers of these lengths, in float32 at least; no sum depends on its neighbours."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return torch.stack([part.sum() for part in wide.split(list(lengths))])


PairValues = Float[Tensor, " pairs"]
AnswerValues = Float[Tensor, "pairs 2"]


@dataclass(frozen=True)
class PairLogps:
    """What a loss sees of a batch: values of every scored token, answer after answer, chosen before rejected.

    Attributes:
        policy_token_logps: log p(token | everything before it) under the policy, nats.
        reference_token_logps: The same under the reference; NaN where there is none.
        on_policy: log p(token) - log sum_v p_v^2 under the policy, nats, without a gradient: how likely the token is
            beside one that the policy draws itself.
        counts: Scored tokens of every answer, on the host.
        margins: By how much the chosen answer of each pair is better, NaN where the data do not say; None: no margin.
    """

    policy_token_logps: Float[Tensor, " scored"]
    reference_token_logps: Float[Tensor, " scored"]
    on_policy_log_weights: Float[Tensor, " scored"]
    answer_lengths: tuple[int, ...]
    margins: PairValues | None = None

    @cached_property
    def policy(self) -> AnswerValues:
        """lp: log pi(y|x), summed over the tokens of each answer, nats."""
        return self.answer_sums(self.policy_token_logps)

    @cached_property
    def reference(self) -> AnswerValues:
        """The same under the reference."""
        return self.answer_sums(self.reference_token_logps)

    @cached_property
    def lengths(self) -> AnswerValues:
        """|y|: scored tokens of each answer."""
        return self.policy_token_logps.new_tensor(self.answer_lengths).reshape(-1, 2)

    @property
    def logratios(self) -> AnswerValues:
        """D = log pi(y|x) - log pi_ref(y|x), nats."""
        return self.policy - self.reference

    @property
    def mean_token_logps(self) -> AnswerValues:
        """n = lp / |y|: mean log-probability of a token under the policy, nats."""
        return self.policy / self.lengths

    def answer_sums(self, token_values: Float[Tensor, " scored"]) -> AnswerValues:
        """Sums of values of tokens: column 0 is the chosen answer, column 1 the rejected one."""
        return sum_per_answer(token_values, self.answer_lengths).reshape(-1, 2)


def bounded_field(default: float, interval: str) -> Any:
    """A number that must lie in an interval, ``(0, inf)`` or ``[0, 0.5]``: a round bracket leaves the bound out."""
    return field(default=default, metadata={"interval": interval})


def is_in_interval(value: float, interval: str) -> bool:
    """Whether a number lies in an interval as `parameter` takes it; NaN lies in none."""
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


class BoundedFields:
    """A frozen dataclass that refuses a `parameter` outside its interval."""

    def __post_init__(self) -> None:
        """Check every parameter that has an interval.

        Raises:
            ValueError: It lies outside.
        """
        for each in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value, interval = self.__dict__[each.name], each.metadata.get("interval")
            if interval and not is_in_interval(value, interval):
                raise ValueError(f"{each.name}: expected a number in {interval}, got {value}.")


@dataclass(frozen=True)
class UnknownInitialLoss:
    """The loss of a policy that equals its reference is no known number.

    Attributes:
        reason: Why.
    """

    reason: str


class PreferenceLoss(BoundedFields, ABC):
    """One loss: a frozen dataclass with its own parameters and the equation in `__call__`.

    It is arithmetic: no model, no configuration, no logging, no reduction. The paragraphs of its docstring are what it
    is, its formula, its source (`python -m dpo losses` prints them), in the notation of `dpo.losses`.
    """

    @abstractmethod
    def __call__(self, logps: PairLogps) -> PairValues:
        """The loss of each pair."""

    @abstractmethod
    def rewards(self, logps: PairLogps) -> AnswerValues:
        """What the loss takes for the reward of each answer, without a gradient; for metrics only."""

    @property
    @abstractmethod
    def initial_loss(self) -> float | UnknownInitialLoss:
        """The loss of any pair when the policy equals the reference."""

    @property
    @abstractmethod
    def uses_reference(self) -> bool:
        """Whether it needs the reference's log-probabilities."""

    @property
    @abstractmethod
    def uses_margins(self) -> bool:
        """Whether it needs to know by how much the chosen answer is better."""

    @property
    @abstractmethod
    def needs_whole_batch(self) -> bool:
        """Whether it looks at all pairs of an optimizer step at once, so that the step cannot be cut into parts."""


class ReferenceLoss(PreferenceLoss):
    """A loss of log-ratios; the implicit reward of an answer is beta times its log-ratio."""

    beta: float
    uses_reference = True
    uses_margins: bool = False

    def rewards(self, logps: PairLogps) -> AnswerValues:
        """r = beta D (equation 5 of 2305.18290 without the partition function, which cancels)."""
        return self.beta * logps.logratios.detach()


class PairLoss(ReferenceLoss):
    """A pair costs the same whatever stands beside it."""

    needs_whole_batch = False


class BatchLoss(ReferenceLoss):
    """The loss is one of all pairs of a step together; the values it gives add up to it."""

    needs_whole_batch = True


class PolicyLoss(PreferenceLoss):
    """A loss of the policy's log-probabilities alone: no reference, and so no constant at the start."""

    initial_loss = UnknownInitialLoss("it depends on what the policy already knows")
    uses_reference = False
    uses_margins = False
    needs_whole_batch = False


def smoothed_logistic_loss(x: PairValues, label_smoothing: float) -> PairValues:
    """-log S(x) when that share of the labels is flipped."""
    return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


def chosen_minus_rejected(answers: AnswerValues) -> PairValues:
    """Chosen minus rejected."""
    return answers[:, 0] - answers[:, 1]


def sort_ascending(values: PairValues) -> PairValues:
    """Sorted over the batch."""
    return torch.sort(values).values

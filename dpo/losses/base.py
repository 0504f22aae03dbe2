"""What a loss receives, what every loss provides, and the arithmetic that several losses share.

`PairLogps` holds the log-probabilities of a batch of pairs and `PreferenceLoss` is the base class of every loss. The
equations of the papers are in the other modules of this package.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

DEFAULT_REWARD_SCALE = 0.1  # for losses without a beta
PairValues = Float[Tensor, " pairs"]
AnswerValues = Float[Tensor, "pairs 2"]


def sum_per_answer(values: Float[Tensor, " scored"], lengths: Sequence[int]) -> Float[Tensor, " answers"]:
    """Sum per-token values over each answer.

    Args:
        values: One value per scored token, answer after answer.
        lengths: Scored tokens of each answer.

    Returns:
        One sum per answer, in float32 or wider. Each is summed on its own, so it does not depend on its neighbours.
    """
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    # The empty slice is the result if there are no answers; it keeps the graph.
    return torch.cat([wide[:0], *(answer.sum()[None] for answer in wide.split(list(lengths)))])


@dataclass(frozen=True)
class PairLogps:
    """The input of a loss: one value per scored token, answer after answer, chosen before rejected.

    Attributes:
        policy_token_logps: log p(token | everything before it) under the policy, nats.
        reference_token_logps: The same under the reference; NaN where there is no reference.
        on_policy_log_weights: log p(token) - log sum_v p_v^2 under the policy, nats, without a gradient: how likely the
            token is compared with one that the policy samples itself.
        answer_lengths: Scored tokens of every answer, as Python integers (on the host).
        margins: How much better the chosen answer of each pair is, NaN where the data do not say. None: no margins.
    """

    policy_token_logps: Float[Tensor, " scored"]
    reference_token_logps: Float[Tensor, " scored"]
    on_policy_log_weights: Float[Tensor, " scored"]
    answer_lengths: tuple[int, ...]
    margins: PairValues | None = None

    @cached_property
    def policy(self) -> AnswerValues:
        """lp = log pi(y|x), summed over the tokens of each answer, nats."""
        return self.answer_sums(self.policy_token_logps)

    @cached_property
    def reference(self) -> AnswerValues:
        """log pi_ref(y|x), summed over the tokens of each answer, nats."""
        return self.answer_sums(self.reference_token_logps)

    @cached_property
    def lengths(self) -> AnswerValues:
        """|y|: scored tokens of each answer."""
        like = self.policy_token_logps
        # from pinned memory, so that the host does not wait for the copy
        counts = torch.tensor(self.answer_lengths, dtype=like.dtype, pin_memory=like.is_cuda)
        return counts.to(like.device, non_blocking=True).reshape(-1, 2)

    @property
    def logratios(self) -> AnswerValues:
        """D = log pi(y|x) - log pi_ref(y|x), nats."""
        return self.policy - self.reference

    @property
    def mean_token_logps(self) -> AnswerValues:
        """n = lp / |y|: mean log-probability of a token under the policy, nats."""
        return self.policy / self.lengths

    @classmethod
    def from_sums(
        cls,
        policy_chosen: PairValues,
        policy_rejected: PairValues,
        reference_chosen: PairValues | None = None,
        reference_rejected: PairValues | None = None,
        *,
        lengths: Float[Tensor, "pairs 2"] | Int[Tensor, "pairs 2"] | None = None,
    ) -> "PairLogps":
        """Build the input of a loss from log-probabilities of whole answers.

        Args:
            policy_chosen: log pi(y_w|x) of each pair under the policy, nats.
            policy_rejected: log pi(y_l|x) of each pair under the policy, nats.
            reference_chosen: log pi_ref(y_w|x) of each pair, nats. None: there is no reference.
            reference_rejected: log pi_ref(y_l|x) of each pair, nats.
            lengths: Tokens of the chosen and the rejected answer of each pair, for losses that use them.

        Returns:
            An input for every loss except `LD` and `WPO`, which need values of single tokens and raise ValueError.

        Example:
            >>> import torch
            >>> from dpo import losses
            >>> logps = losses.PairLogps.from_sums(
            ...     policy_chosen=torch.tensor([-10.0]),
            ...     policy_rejected=torch.tensor([-14.0]),
            ...     reference_chosen=torch.tensor([-12.0]),
            ...     reference_rejected=torch.tensor([-12.0]),
            ... )
            >>> losses.DPO(beta=0.1)(logps)
            tensor([0.5130])
        """
        policy = torch.stack([policy_chosen, policy_rejected], -1).flatten()
        unknown = torch.full_like(policy.detach(), torch.nan)
        if reference_chosen is None or reference_rejected is None:
            reference = unknown
        else:
            reference = torch.stack([reference_chosen, reference_rejected], -1).flatten()
        return _SummedPairLogps(policy, reference, unknown, (1,) * len(policy), None, lengths)

    def require_token_values(self, loss: object) -> None:
        """Raise ValueError if only sums are known, for a loss that needs values of single tokens."""

    def answer_sums(self, token_values: Float[Tensor, " scored"]) -> AnswerValues:
        """Sum per-token values over each answer; column 0 is the chosen answer, column 1 the rejected one."""
        return sum_per_answer(token_values, self.answer_lengths).reshape(-1, 2)


@dataclass(frozen=True)
class _SummedPairLogps(PairLogps):
    """Sums of whole answers, each stored as if it were a single token."""

    known_lengths: Tensor | None = None

    @cached_property
    def lengths(self) -> AnswerValues:
        if self.known_lengths is None:
            raise ValueError("this loss needs the lengths of the answers: pass PairLogps.from_sums(..., lengths=...).")
        return self.known_lengths.to(self.policy_token_logps)

    def require_token_values(self, loss: object) -> None:
        raise ValueError(
            f"{loss} needs values of single tokens, got sums over answers: build a PairLogps directly instead of "
            "calling from_sums."
        )


def bounded_field(default: float, interval: str) -> Any:
    """Declare a dataclass field whose value must lie in an interval.

    Args:
        default: Value of the field if none is given.
        interval: Such as ``(0, inf)`` or ``[0, 0.5]``; a round bracket excludes the bound.
    """
    return field(default=default, metadata={"interval": interval})


def is_in_interval(value: float, interval: str) -> bool:
    """Return whether a number lies in an interval written as for `bounded_field`; NaN lies in none."""
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


class BoundedFields:
    """Base of frozen dataclasses that reject a `bounded_field` outside its interval."""

    def __post_init__(self) -> None:
        """Check every field that has an interval.

        Raises:
            ValueError: A value lies outside its interval.
        """
        for option in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = self.__dict__[option.name]
            interval = option.metadata.get("interval")
            if interval and not (isinstance(value, int | float) and is_in_interval(value, interval)):
                raise ValueError(f"{option.name}: expected a number in {interval}, got {value!r}.")


@dataclass(frozen=True)
class UnknownInitialLoss:
    """Stands in for `PreferenceLoss.initial_loss` where the loss at the start is not a known constant.

    Attributes:
        reason: Why it is not known.
    """

    reason: str


class PreferenceLoss(BoundedFields, ABC):
    """Base class of losses: a frozen dataclass with its parameters as fields and its equation in `__call__`.

    A subclass must define `__call__` and nothing else. The defaults are those of a loss of log-ratios, one value per
    pair, whose implicit reward is beta times the log-ratio. A loss is pure arithmetic: it knows no model and no
    configuration, logs nothing and does not reduce over the batch.

    The docstring of a loss in this package starts with three paragraphs, which `python -m dpo losses` prints: what it
    is, its formula in the notation of `dpo.losses`, and its source.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch
        >>> from dpo import losses
        >>> @dataclass(frozen=True)
        ... class SquaredHinge(losses.PreferenceLoss):
        ...     beta: float = 0.1
        ...
        ...     def __call__(self, logps):
        ...         chosen, rejected = (self.beta * logps.logratios).unbind(-1)
        ...         return (1 - (chosen - rejected)).relu() ** 2
        >>> policy, reference = torch.tensor([[-10.0], [-14.0]]), torch.tensor([[-12.0], [-12.0]])
        >>> logps = losses.PairLogps.from_sums(*policy, *reference)
        >>> SquaredHinge()(logps)
        tensor([0.3600])
        >>> SquaredHinge().rewards(logps)
        tensor([[ 0.2000, -0.2000]])
    """

    @abstractmethod
    def __call__(self, logps: PairLogps) -> PairValues:
        """Return the loss of each pair."""

    def rewards(self, logps: PairLogps) -> AnswerValues:
        """Return the implicit reward of each answer, without a gradient; it is used for metrics only.

        By default r = beta D (equation 5 of 2305.18290 without the partition function, which cancels).
        """
        return self.reward_scale * logps.logratios.detach()

    @property
    def reward_scale(self) -> float:
        """Factor from log-ratio to reward: beta, if the loss has one."""
        return float(getattr(self, "beta", DEFAULT_REWARD_SCALE))

    @property
    def initial_loss(self) -> float | UnknownInitialLoss:
        """Loss of any pair while the policy equals the reference; the preflight checks it before the first step."""
        return UnknownInitialLoss(f"{type(self).__name__} defines no initial_loss")

    @property
    def uses_reference(self) -> bool:
        """Whether the loss needs the reference's log-probabilities."""
        return True

    @property
    def uses_margins(self) -> bool:
        """Whether the loss needs to know how much better the chosen answer is."""
        return False

    @property
    def needs_whole_batch(self) -> bool:
        """Whether the loss of a pair depends on the other pairs, so that an optimizer step cannot be split up."""
        return False


class PolicyLoss(PreferenceLoss):
    """Base class of losses without a reference, whose reward is by default beta times log-probability per token."""

    initial_loss = UnknownInitialLoss("it depends on what the policy already knows")
    uses_reference = False

    def rewards(self, logps: PairLogps) -> AnswerValues:
        """Return r = beta lp / |y| of each answer, without a gradient."""
        return self.reward_scale * logps.mean_token_logps.detach()


def smoothed_logistic_loss(x: PairValues, label_smoothing: float) -> PairValues:
    """Return -(1-e) log S(x) - e log S(-x): the logistic loss if a share e = `label_smoothing` of labels is flipped."""
    return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


def chosen_minus_rejected(answers: AnswerValues) -> PairValues:
    """Return the value of the chosen answer minus that of the rejected one, for each pair."""
    return answers[:, 0] - answers[:, 1]

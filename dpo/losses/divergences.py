"""f-divergences, which keep the policy close to the reference in losses of the difference between two answers.

Each maps log-ratios to scores: f'(t) at t = exp(D) = pi / pi_ref (Wang et al. 2023, arXiv 2309.16240). Additive
constants are TRL's; they cancel in a difference. Every score is 0 at D = 0 and grows with D, and it and its gradient
are finite for any D that float32 can hold.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import log

import torch.nn.functional as F
from torch import Tensor

from dpo.losses.base import AnswerValues, BoundedFields, bounded_field

EXPM1_LIMIT = 30.0  # e^30 = 1e13: its product with a log-ratio of 1e4 can still be squared in float32


def safe_expm1(x: Tensor) -> Tensor:
    """Return exp(x) - 1 up to `EXPM1_LIMIT` and its tangent beyond: finite, rising, with a gradient that stays."""
    low = x.clamp(max=EXPM1_LIMIT)
    return low.expm1() + low.exp() * (x - low)


class Divergence(BoundedFields, ABC):
    """Base class of divergences from the reference, each given as the score of a log-ratio.

    The docstring of a divergence in this package starts with what it is and its score, which `python -m dpo losses`
    prints.
    """

    @abstractmethod
    def __call__(self, logratios: AnswerValues) -> AnswerValues:
        """Return the score f'(exp(D)) of each answer from its log-ratio D."""


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(pi || pi_ref), the divergence of DPO.

    D

    Example:
        >>> import torch
        >>> from dpo import losses
        >>> losses.ReverseKL()(torch.tensor([[2.0, -2.0]]))
        tensor([[ 2., -2.]])
    """

    def __call__(self, logratios: AnswerValues) -> AnswerValues:
        """Return the scores for f(t) = t log t."""
        return logratios


REVERSE_KL = ReverseKL()


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(pi_ref || pi).

    1 - exp(-D)

    Example:
        >>> import torch
        >>> from dpo import losses
        >>> losses.ForwardKL()(torch.tensor([[2.0, -2.0]]))
        tensor([[ 0.8647, -6.3891]])
    """

    def __call__(self, logratios: AnswerValues) -> AnswerValues:
        """Return the scores for f(t) = -log t."""
        return -safe_expm1(-logratios)


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """The Jensen-Shannon divergence.

    log 2 + log S(D)

    Example:
        >>> import torch
        >>> from dpo import losses
        >>> losses.JensenShannon()(torch.tensor([[2.0, -2.0]]))
        tensor([[ 0.5662, -1.4338]])
    """

    def __call__(self, logratios: AnswerValues) -> AnswerValues:
        """Return the scores for f(t) = t log t - (t + 1) log((t + 1) / 2)."""
        return log(2) + F.logsigmoid(logratios)


@dataclass(frozen=True)
class Alpha(Divergence):
    """The alpha-divergence: forward KL at alpha = 0, approaching reverse KL as alpha approaches 1.

    (exp((alpha - 1) D) - 1) / (alpha - 1)

    Attributes:
        alpha: At least 0 and not 1.

    Example:
        >>> import torch
        >>> from dpo import losses
        >>> losses.Alpha(alpha=0.5)(torch.tensor([[2.0, -2.0]]))
        tensor([[ 1.2642, -3.4366]])
    """

    alpha: float = bounded_field(0.5, "[0, inf)")

    def __post_init__(self) -> None:
        """Check that alpha is in its interval and not 1.

        Raises:
            ValueError: alpha is negative or 1.
        """
        super().__post_init__()
        if self.alpha == 1:
            raise ValueError("alpha: expected a number other than 1, got 1: that divergence is ReverseKL.")

    def __call__(self, logratios: AnswerValues) -> AnswerValues:
        """Return the scores f'(t) = (t^(alpha-1) - 1) / (alpha - 1)."""
        power = self.alpha - 1
        return safe_expm1(power * logratios) / power

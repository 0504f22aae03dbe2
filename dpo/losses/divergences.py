"""f-divergences: what holds the policy near the reference in losses of the difference of two answers.

Takes log-ratios, gives scores: f'(t) at t = exp(D) = pi / pi_ref (Wang et al. 2023, arXiv 2309.16240; TRL's constants,
which cancel in a difference). Every score is 0 at D = 0, grows with D, and is finite with a gradient at any D that
float32 can hold.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import log

import torch.nn.functional as F
from torch import Tensor

from dpo.losses.base import AnswerValues, BoundedFields, bounded_field

EXPM1_LIMIT = 30.0  # e^30 = 1e13: its product with a log-ratio of 1e4 can still be squared in float32


def safe_expm1(x: Tensor) -> Tensor:
    """exp(x) - 1 up to `LIMIT`, its tangent beyond: finite, rising, with a gradient that does not vanish."""
    low = x.clamp(max=EXPM1_LIMIT)
    return low.expm1() + low.exp() * (x - low)


class Divergence(BoundedFields, ABC):
    """How far the policy may move, as a score of the log-ratio."""

    @abstractmethod
    def __call__(self, logratios: AnswerValues) -> AnswerValues:
        """The score of each answer."""


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(pi || pi_ref), that of DPO.

    D
    """

    def __call__(self, logratios: AnswerValues) -> AnswerValues:
        """f(t) = t log t."""
        return logratios


REVERSE_KL = ReverseKL()


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(pi_ref || pi).

    1 - exp(-D)
    """

    def __call__(self, logratios: AnswerValues) -> AnswerValues:
        """f(t) = -log t."""
        return -safe_expm1(-logratios)


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """Jensen-Shannon.

    log 2 + log S(D)
    """

    def __call__(self, logratios: AnswerValues) -> AnswerValues:
        """f(t) = t log t - (t + 1) log((t + 1) / 2)."""
        return log(2) + F.logsigmoid(logratios)


@dataclass(frozen=True)
class Alpha(Divergence):
    """The alpha-divergence: forward KL at alpha = 0, on the way to reverse KL as alpha nears 1.

    (exp((alpha - 1) D) - 1) / (alpha - 1)

    Attributes:
        alpha: At least 0 and not 1.
    """

    alpha: float = bounded_field(0.5, "[0, inf)")

    def __post_init__(self) -> None:
        """Check alpha.

        Raises:
            ValueError: It is negative or 1.
        """
        super().__post_init__()
        if self.alpha == 1:
            raise ValueError("alpha: expected a number other than 1, got 1: that divergence is ReverseKL.")

    def __call__(self, logratios: AnswerValues) -> AnswerValues:
        """f'(t) = (t^(alpha-1) - 1) / (alpha - 1)."""
        power = self.alpha - 1
        return safe_expm1(power * logratios) / power

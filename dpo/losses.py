"""Preference losses: log-probabilities of chosen and rejected answers -> one value per pair.

Takes `PairLogps`, gives a loss per pair. A loss is arithmetic: no model, no batch, no logging, no reduction. Notation
as in Rafailov et al. 2023 (arXiv 2305.18290): beta holds the policy near the reference (larger is nearer), a log-ratio
is log pi(y|x) - log pi_ref(y|x), the implicit reward of an answer is beta times its log-ratio. A new loss is a new
final class.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import log

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """What a loss sees of a batch; column 0 is the chosen answer, column 1 the rejected one.

    Attributes:
        policy: Summed log-probability of each answer under the policy, nats.
        reference: The same under the reference.
        lengths: Scored tokens of each answer.
    """

    policy: Float[Tensor, "pairs 2"]
    reference: Float[Tensor, "pairs 2"]
    lengths: Float[Tensor, "pairs 2"]

    @property
    def logratios(self) -> Float[Tensor, "pairs 2"]:
        """log pi(y|x) - log pi_ref(y|x), nats."""
        return self.policy - self.reference


class PreferenceLoss(ABC):
    """One loss: a frozen dataclass with its own parameters, the equation in `__call__`."""

    beta: float

    @abstractmethod
    def __call__(self, logps: PairLogps) -> Float[Tensor, " pairs"]:
        """The loss of each pair."""

    @property
    @abstractmethod
    def at_start(self) -> float:
        """The loss of any pair when the policy equals the reference."""

    def rewards(self, logps: PairLogps) -> Float[Tensor, "pairs 2"]:
        """Implicit rewards beta * log-ratio (eq. 5 of 2305.18290 without the partition function, which cancels)."""
        return self.beta * logps.logratios.detach()


def positive(name: str, value: float) -> None:
    """Refuse a parameter that is not a positive number."""
    if not value > 0:
        raise ValueError(f"{name}: expected a number above 0, got {value}.")


@dataclass(frozen=True)
class DPO(PreferenceLoss):
    """Direct Preference Optimization; with label smoothing the conservative DPO of Mitchell 2023.

    Attributes:
        beta: How strongly the policy is held near the reference.
        label_smoothing: Assumed share of flipped labels, in [0, 0.5].
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Check the parameters.

        Raises:
            ValueError: beta is not positive, or label_smoothing lies outside [0, 0.5].
        """
        positive("beta", self.beta)
        if not 0 <= self.label_smoothing <= 0.5:
            raise ValueError(
                f"label_smoothing: expected a share of flipped labels in [0, 0.5], got {self.label_smoothing}."
            )

    def __call__(self, logps: PairLogps) -> Float[Tensor, " pairs"]:
        """Equation 7 of 2305.18290; smoothed: equation 3 of the note on noisy labels (ericmitchell.ai/cdpo.pdf)."""
        chosen, rejected = logps.logratios.unbind(-1)
        margin = self.beta * (chosen - rejected)
        return -(1 - self.label_smoothing) * F.logsigmoid(margin) - self.label_smoothing * F.logsigmoid(-margin)

    @property
    def at_start(self) -> float:
        """-log sigmoid(0)."""
        return log(2)

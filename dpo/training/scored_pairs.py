"""What a preference stage has computed of every pair of a micro-batch, for whoever listens."""

from collections.abc import Callable
from dataclasses import dataclass

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor

from dpo.models.batch import Batch


@dataclass(frozen=True)
class ScoredPairs:
    """The pairs of a micro-batch and their values, on the device and without a gradient; chosen before rejected.

    Attributes:
        batch: The pairs.
        policy: Log-probability of every answer under the policy, nats.
        reference: The same under the reference; NaN where there is none.
        rewards: Implicit reward of every answer, as the loss defines it.
        losses: Loss of every pair times its weight.
    """

    batch: Batch
    policy: Float[Tensor, "pairs 2"]
    reference: Float[Tensor, "pairs 2"]
    rewards: Float[Tensor, "pairs 2"]
    losses: Float[Tensor, " pairs"]

    def stacked_values(self) -> Float[Tensor, "pairs 7"]:
        """Return all values beside each other, in the order of the attributes, in float32."""
        return torch.cat([self.policy, self.reference, self.rewards, self.losses.unsqueeze(1)], 1).float()


PairListener = Callable[[L.LightningModule, ScoredPairs], None]
"""Takes the stage and the values of a micro-batch; it must not wait for the device."""

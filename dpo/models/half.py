"""Frozen weights of linear layers in bfloat16, where autocast computes in it anyway.

Autocast would cast a frozen weight anew at every use. Kept in bfloat16, it takes half of the memory, is cast never, and
every product is the same to the bit. Embeddings, norms and whatever else autocast computes in float32 stay as they are,
as do heads that share their weight with an embedding.
"""

from collections import Counter
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HalfLinear(nn.Linear):
    """A linear layer with a frozen weight in bfloat16; outside autocast it computes in the type of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the product, and the bias added to it."""
        if torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


@torch.no_grad()
def halve_frozen_weights(model: nn.Module, *, may_round: bool, keep: Collection[int] = ()) -> None:
    """Keep the frozen weights of a model's linear layers in bfloat16.

    Args:
        model: A model that is computed under autocast in bfloat16.
        may_round: Also convert weights that bfloat16 cannot hold exactly: nothing but passes under autocast, which
            rounds them too, needs all of their digits.
        keep: Ids of weights that are left as they are.
    """
    parts = list(model.modules())
    uses = Counter(id(p) for part in parts for p in part._parameters.values())
    for part in parts:
        if type(part) is not nn.Linear or part.weight.requires_grad or uses[id(part.weight)] > 1:
            continue
        half = part.weight.to(torch.bfloat16)
        exact = torch.equal(half.to(part.weight.dtype), part.weight)
        if id(part.weight) not in keep and (may_round or exact):
            part.weight.data = half
        if part.weight.dtype == torch.bfloat16:  # or was converted in another model that shares it
            part.__class__ = HalfLinear

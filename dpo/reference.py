"""What the policy is compared with: how a reference is made, and what scores its answers.

A `Reference` is a choice on the command line; its `build` gives a frozen module that turns a `Batch` into the
log-probability of every scored token, through the same scorer as the policy. Knows nothing of losses.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo.batch import Batch
from dpo.logps import score
from dpo.models import Loader
from dpo.sharing import vocabulary


class Frozen(nn.Module):
    """A model that is never trained: its parameters need no gradient and no pass through it keeps a graph."""

    def __init__(self, model: PreTrainedModel, origin: str) -> None:
        """Freeze a model; `origin` says in words what it is."""
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.origin = origin

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """Every model of its own, by role."""
        return {"reference": self.model}

    @torch.no_grad()
    def forward(self, batch: Batch) -> Float[Tensor, " scored"]:
        """log p of every scored token, nats."""
        return score(self.model, batch).logps


class Absent(nn.Module):
    """Stands where a loss needs no reference: no model, and no number that could be taken for a log-probability."""

    origin = "none, the loss needs none"
    models: Mapping[str, PreTrainedModel] = MappingProxyType({})

    def forward(self, batch: Batch) -> Float[Tensor, " scored"]:
        """NaN for every scored token."""
        return torch.full_like(batch.targets, torch.nan, dtype=torch.float32)


class Reference(ABC):
    """How the reference of a run is made."""

    @abstractmethod
    def build(self, policy: PreTrainedModel, loader: Loader) -> Frozen | Absent:
        """Make it, before the policy has learned anything."""


@dataclass(frozen=True)
class Nothing(Reference):
    """No reference, for losses without one."""

    def build(self, policy: PreTrainedModel, loader: Loader) -> Absent:
        """Make nothing."""
        return Absent()


@dataclass(frozen=True)
class Copy(Reference):
    """A frozen copy of the policy's actual weights, not a second reading of its name."""

    def build(self, policy: PreTrainedModel, loader: Loader) -> Frozen:
        """Copy the policy."""
        return Frozen(deepcopy(policy), "frozen copy of the policy")


@dataclass(frozen=True)
class Model(Reference):
    """Another model.

    Attributes:
        path: Folder or hub id.
    """

    path: str

    def build(self, policy: PreTrainedModel, loader: Loader) -> Frozen:
        """Read it; it must speak the policy's vocabulary.

        Raises:
            ValueError: The vocabularies differ in size.
        """
        model = loader.model(self.path)
        ours, theirs = vocabulary(policy), vocabulary(model)
        if ours != theirs:
            raise ValueError(
                f"the reference {self.path!r} has a vocabulary of {theirs} tokens, the policy one of {ours}: token ids "
                "would mean different things. Choose a reference with the policy's tokenizer."
            )
        return Frozen(model, f"the model {self.path}")

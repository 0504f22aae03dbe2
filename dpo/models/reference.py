"""What the policy is compared with: how a reference is made, and what gives the log-probabilities of its answers.

A `Reference` is a choice on the command line; its `build` gives a `Comparison`, a module that turns a `Batch` into the
log-probability of every scored token, through the same scorer as the policy. Knows nothing of losses.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo.models import lora
from dpo.models.batch import Batch
from dpo.models.loading import Loader, weights_sha256
from dpo.models.prompt_sharing import vocabulary
from dpo.models.scoring import score

SAME, ROUNDED, OTHER = 0.0, 1.0, float("inf")
"""How far a reference may be from the policy before the first step: not at all, by rounding, or as far as it is."""
# What rounding does to a token's log-probability from one batch to another, nats.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.05}


def computed_in(model: PreTrainedModel) -> torch.dtype:
    """The type that a pass computes in: within autocast its own, otherwise the model's."""
    device = model.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype


def rounding(model: PreTrainedModel) -> float:
    """How much rounding alone can change a token's log-probability, nats."""
    return ROUNDING[computed_in(model)]


class Comparison(nn.Module, ABC):
    """A reference that was made.

    Attributes:
        origin: What it is, in words.
        sha256: Of its weights as they are before training; empty where there are none.
        distance: From the policy before the first step: `SAME`, `ROUNDED` or `OTHER`.
    """

    origin: str
    sha256: str
    distance: float

    @abstractmethod
    def forward(self, batch: Batch) -> Float[Tensor, " scored"]:
        """log p of every scored token, nats; without a graph."""

    @property
    @abstractmethod
    def models(self) -> dict[str, PreTrainedModel]:
        """Every model of its own that is in memory, by role."""

    def prepare(self, module: L.LightningModule) -> None:
        """Called before every stage (fit, validate, ...), when data and devices are known. Nothing is to be done."""

    def follow(self, policy: PreTrainedModel, step: int) -> None:
        """Called after every optimizer step, which count from 1. A fixed reference stays as it is."""

    def changing(self) -> set[str]:
        """Names of the weights that a checkpoint must hold. None of a fixed reference."""
        return set()


class Held(Comparison, ABC):
    """A model in memory that is never trained: its parameters need no gradient, no pass through it keeps a graph."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Freeze a model."""
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.sha256 = weights_sha256(model)

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """The one."""
        return {"reference": self.model}

    @torch.no_grad()
    def forward(self, batch: Batch) -> Float[Tensor, " scored"]:
        """log p of every scored token, nats."""
        return score(self.model, batch).logps


class Frozen(Held):
    """A model that stays as it is."""

    def __init__(self, model: PreTrainedModel, origin: str, distance: float) -> None:
        """Say what it is."""
        super().__init__(model)
        self.origin, self.distance = origin, distance


class Follower(Held):
    """A model that goes after the policy, in effective weights: a mean of products is no product of mean factors.

    It shares every weight that does not train with the policy; the others are in the checkpoint.
    """

    def __init__(self, policy: PreTrainedModel, alpha: float, tau: int) -> None:
        """Begin as a copy of the policy."""
        super().__init__(lora.merged(policy))
        shared = set(map(id, policy.parameters()))
        self.moving = [name for name, p in self.model.named_parameters() if id(p) not in shared]
        self.alpha, self.tau = alpha, tau
        self.origin = f"moving, {alpha:g} of the policy every {tau} steps, now a copy of it"
        self.distance = SAME if lora.untrained(policy) else ROUNDED  # base + product in one matrix, or in two

    @torch.no_grad()
    def follow(self, policy: PreTrainedModel, step: int) -> None:
        """Every tau steps: pi_ref <- alpha pi + (1 - alpha) pi_ref (TR-DPO, arXiv 2404.09656, section 3.1)."""
        if step % self.tau == 0:
            for name in self.moving:
                self.model.get_parameter(name).lerp_(lora.effective(policy, name), self.alpha)

    def changing(self) -> set[str]:
        """What moves."""
        return {f"model.{name}" for name in self.moving}


class Absent(Comparison):
    """Stands where a loss needs no reference: no model, and no number that could be taken for a log-probability."""

    origin, sha256, distance = "none, the loss needs none", "", OTHER

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """None."""
        return {}

    def forward(self, batch: Batch) -> Float[Tensor, " scored"]:
        """NaN for every scored token."""
        return torch.full_like(batch.targets, torch.nan, dtype=torch.float32)


class Reference(ABC):
    """How the reference of a run is made."""

    @abstractmethod
    def build(self, policy: PreTrainedModel, loader: Loader) -> Comparison:
        """Make it, before the policy has learned anything."""


@dataclass(frozen=True)
class Nothing(Reference):
    """No reference, for losses without one."""

    def build(self, policy: PreTrainedModel, loader: Loader) -> Absent:
        """Make nothing."""
        return Absent()


@dataclass(frozen=True)
class Copy(Reference):
    """The policy as it is before training: a frozen copy of its actual weights, not a second reading of its name.

    What does not train is shared, not copied. So beside a new adapter it is the policy with the adapter off, and beside
    an adapter that is trained on a frozen copy of that adapter, on the same base: neither is a second model in memory.
    """

    def build(self, policy: PreTrainedModel, loader: Loader) -> Frozen:
        """Copy what trains."""
        if not lora.untrained(policy):
            return Frozen(lora.copied(policy), "frozen copy of the adapter as it was loaded, on its base", SAME)
        adapted = bool(lora.layers(policy))
        origin = "the policy with its adapter off, weights shared" if adapted else "frozen copy of the policy"
        return Frozen(lora.without(policy), origin, SAME)


@dataclass(frozen=True)
class AdapterOff(Reference):
    """The policy without its adapter, even where that had been trained before; weights are shared."""

    def build(self, policy: PreTrainedModel, loader: Loader) -> Frozen:
        """Leave the adapter out.

        Raises:
            ValueError: There is none.
        """
        if not lora.layers(policy):
            raise ValueError(
                "--model.reference AdapterOff: the policy has no adapter. Leave it out for a frozen copy, "
                "or add an adapter: --model.adapter LoRA."
            )
        distance = SAME if lora.untrained(policy) else OTHER
        return Frozen(lora.without(policy), "the policy with its adapter off, weights shared", distance)


@dataclass(frozen=True)
class Moving(Reference):
    """TR-DPO (Gorbatovski et al. 2024, arXiv 2404.09656): the reference goes after the policy.

    Attributes:
        alpha: Share of the policy in every update, in (0, 1]: 1 is the hard update, less the soft one.
        tau: Steps from one update to the next; 1 with a small alpha is an exponential moving average.
    """

    alpha: float = 0.6
    tau: int = 512

    def __post_init__(self) -> None:
        """Check both.

        Raises:
            ValueError: One is outside its range.
        """
        if not (0 < self.alpha <= 1 and self.tau >= 1):
            raise ValueError(
                f"--model.reference Moving: expected alpha in (0, 1] and tau of 1 step or more, got {self.alpha} and "
                f"{self.tau}."
            )

    def build(self, policy: PreTrainedModel, loader: Loader) -> Follower:
        """Begin as a copy of the policy."""
        return Follower(policy, self.alpha, self.tau)


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
        return Frozen(model, f"the model {self.path}", OTHER)

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
from dpo.models.loading import ModelLoader, weights_sha256
from dpo.models.prompt_sharing import vocabulary_size
from dpo.models.scoring import score

DISTANCE_NONE, DISTANCE_ROUNDING, DISTANCE_ANY = 0.0, 1.0, float("inf")
"""How far a reference may be from the policy before the first step: not at all, by rounding, or as far as it is."""
# What rounding does to a token's log-probability from one batch to another, nats.
LOGP_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.05}


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """The type that a pass computes in: within autocast its own, otherwise the model's."""
    device = model.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype


def logp_tolerance(model: PreTrainedModel) -> float:
    """How much rounding alone can change a token's log-probability, nats."""
    return LOGP_TOLERANCES[compute_dtype(model)]


class ReferenceModel(nn.Module, ABC):
    """A reference that was made.

    Attributes:
        origin: What it is, in words.
        sha256: Of its weights as they are before training; empty where there are none.
        distance: From the policy before the first step: `SAME`, `ROUNDED` or `OTHER`.
    """

    description: str
    sha256: str
    initial_distance: float

    @abstractmethod
    def forward(self, batch: Batch) -> Float[Tensor, " scored"]:
        """log p of every scored token, nats; without a graph."""

    @property
    @abstractmethod
    def owned_models(self) -> dict[str, PreTrainedModel]:
        """Every model of its own that is in memory, by role."""

    def prepare_for_stage(self, module: L.LightningModule) -> None:
        """Called before every stage (fit, validate, ...), when data and devices are known. Nothing is to be done."""

    def update_from(self, policy: PreTrainedModel, step: int) -> None:
        """Called after every optimizer step, which count from 1. A fixed reference stays as it is."""

    def checkpointed_names(self) -> set[str]:
        """Names of the weights that a checkpoint must hold. None of a fixed reference."""
        return set()


class InMemoryReference(ReferenceModel, ABC):
    """A model in memory that is never trained: its parameters need no gradient, no pass through it keeps a graph."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Freeze a model."""
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.sha256 = weights_sha256(model)

    @property
    def owned_models(self) -> dict[str, PreTrainedModel]:
        """The one."""
        return {"reference": self.model}

    @torch.no_grad()
    def forward(self, batch: Batch) -> Float[Tensor, " scored"]:
        """log p of every scored token, nats."""
        return score(self.model, batch).logps


class FrozenReference(InMemoryReference):
    """A model that stays as it is."""

    def __init__(self, model: PreTrainedModel, description: str, initial_distance: float) -> None:
        """Say what it is."""
        super().__init__(model)
        self.description, self.initial_distance = description, initial_distance


class MovingReference(InMemoryReference):
    """A model that goes after the policy, in effective weights: a mean of products is no product of mean factors.

    It shares every weight that does not train with the policy; the others are in the checkpoint.
    """

    def __init__(self, policy: PreTrainedModel, alpha: float, tau: int) -> None:
        """Begin as a copy of the policy."""
        super().__init__(lora.merge_adapter(policy))
        shared = set(map(id, policy.parameters()))
        self.moving_names = [name for name, p in self.model.named_parameters() if id(p) not in shared]
        self.alpha, self.tau = alpha, tau
        self.description = f"moving, {alpha:g} of the policy every {tau} steps, now a copy of it"
        self.initial_distance = (
            DISTANCE_NONE if lora.equals_base_model(policy) else DISTANCE_ROUNDING
        )  # base + product in one matrix, or in two

    @torch.no_grad()
    def update_from(self, policy: PreTrainedModel, step: int) -> None:
        """Every tau steps: pi_ref <- alpha pi + (1 - alpha) pi_ref (TR-DPO, arXiv 2404.09656, section 3.1)."""
        if step % self.tau == 0:
            for name in self.moving_names:
                self.model.get_parameter(name).lerp_(lora.effective_weight(policy, name), self.alpha)

    def checkpointed_names(self) -> set[str]:
        """What moves."""
        return {f"model.{name}" for name in self.moving_names}


class AbsentReference(ReferenceModel):
    """Stands where a loss needs no reference: no model, and no number that could be taken for a log-probability."""

    description, sha256, initial_distance = "none, the loss needs none", "", DISTANCE_ANY

    @property
    def owned_models(self) -> dict[str, PreTrainedModel]:
        """None."""
        return {}

    def forward(self, batch: Batch) -> Float[Tensor, " scored"]:
        """NaN for every scored token."""
        return torch.full_like(batch.targets, torch.nan, dtype=torch.float32)


class Reference(ABC):
    """How the reference of a run is made."""

    @abstractmethod
    def build_reference(self, policy: PreTrainedModel, loader: ModelLoader) -> ReferenceModel:
        """Make it, before the policy has learned anything."""


@dataclass(frozen=True)
class Nothing(Reference):
    """No reference, for losses without one."""

    def build_reference(self, policy: PreTrainedModel, loader: ModelLoader) -> AbsentReference:
        """Make nothing."""
        return AbsentReference()


@dataclass(frozen=True)
class Copy(Reference):
    """The policy as it is before training: a frozen copy of its actual weights, not a second reading of its name.

    What does not train is shared, not copied. So beside a new adapter it is the policy with the adapter off, and beside
    an adapter that is trained on a frozen copy of that adapter, on the same base: neither is a second model in memory.
    """

    def build_reference(self, policy: PreTrainedModel, loader: ModelLoader) -> FrozenReference:
        """Copy what trains."""
        if not lora.equals_base_model(policy):
            return FrozenReference(
                lora.copy_trainable_weights(policy),
                "frozen copy of the adapter as it was loaded, on its base",
                DISTANCE_NONE,
            )
        adapted = bool(lora.adapter_layers(policy))
        origin = "the policy with its adapter off, weights shared" if adapted else "frozen copy of the policy"
        return FrozenReference(lora.model_without_adapter(policy), origin, DISTANCE_NONE)


@dataclass(frozen=True)
class AdapterOff(Reference):
    """The policy without its adapter, even where that had been trained before; weights are shared."""

    def build_reference(self, policy: PreTrainedModel, loader: ModelLoader) -> FrozenReference:
        """Leave the adapter out.

        Raises:
            ValueError: There is none.
        """
        if not lora.adapter_layers(policy):
            raise ValueError(
                "--model.reference AdapterOff: the policy has no adapter. Leave it out for a frozen copy, "
                "or add an adapter: --model.adapter LoRA."
            )
        distance = DISTANCE_NONE if lora.equals_base_model(policy) else DISTANCE_ANY
        return FrozenReference(
            lora.model_without_adapter(policy), "the policy with its adapter off, weights shared", distance
        )


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

    def build_reference(self, policy: PreTrainedModel, loader: ModelLoader) -> MovingReference:
        """Begin as a copy of the policy."""
        return MovingReference(policy, self.alpha, self.tau)


@dataclass(frozen=True)
class Model(Reference):
    """Another model.

    Attributes:
        path: Folder or hub id.
    """

    path: str

    def build_reference(self, policy: PreTrainedModel, loader: ModelLoader) -> FrozenReference:
        """Read it; it must speak the policy's vocabulary.

        Raises:
            ValueError: The vocabularies differ in size.
        """
        model = loader.load_model(self.path)
        ours, theirs = vocabulary_size(policy), vocabulary_size(model)
        if ours != theirs:
            raise ValueError(
                f"the reference {self.path!r} has a vocabulary of {theirs} tokens, the policy one of {ours}: token ids "
                "would mean different things. Choose a reference with the policy's tokenizer."
            )
        return FrozenReference(model, f"the model {self.path}", DISTANCE_ANY)

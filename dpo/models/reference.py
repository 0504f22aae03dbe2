"""References: what a policy is compared with.

A `Reference` is the user's choice (a frozen copy, another model, ...). Its `build_reference` makes a `ReferenceModel`
from the policy before training: a module that returns the log-probability of every scored token of a `Batch`, computed
by the same scorer as the policy's.
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
from dpo.models.half import halve_frozen_weights
from dpo.models.loading import ModelLoader, adapter_base_model, weights_sha256
from dpo.models.prompt_sharing import vocabulary_size
from dpo.models.scoring import score

REFERENCE_NAMES = ("AdapterOff", "Cached", "Copy", "Model", "Moving", "Nothing")
DISTANCE_NONE, DISTANCE_ROUNDING, DISTANCE_ANY = 0.0, 1.0, float("inf")
"""How far a reference may be from the policy before the first step, in multiples of `logp_tolerance`."""
# What rounding can change in a token's log-probability from one batch to another, in nats.
LOGP_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.05}


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the type that a forward pass computes in: that of autocast if it is on, otherwise the model's."""
    device = model.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype


def logp_tolerance(model: PreTrainedModel) -> float:
    """Return how much rounding alone can change a token's log-probability, in nats."""
    return LOGP_TOLERANCES[compute_dtype(model)]


class ReferenceModel(nn.Module, ABC):
    """The reference of a run, as a `Reference` makes it.

    Attributes:
        description: What the reference is, in words.
        sha256: Hash of its weights before training; empty if it has none.
        initial_distance: `DISTANCE_NONE`, `DISTANCE_ROUNDING` or `DISTANCE_ANY`.
    """

    description: str
    sha256: str
    initial_distance: float

    @abstractmethod
    def forward(self, batch: Batch) -> Float[Tensor, " scored"]:
        """Return the log-probability of every scored token in nats, without a graph."""

    @property
    def owned_models(self) -> dict[str, PreTrainedModel]:
        """The models of the reference that are in memory, by role."""
        return {}

    def halve_weights(self, policy: PreTrainedModel) -> None:
        """Keep in bfloat16 what autocast computes in it anyway; does nothing by default."""

    def prepare_for_stage(self, module: L.LightningModule) -> None:
        """Prepare for a stage (fit, validate, ...), whose data and devices are known; does nothing by default."""

    def update_from(self, policy: PreTrainedModel, step: int) -> None:
        """Follow the policy after an optimizer step, counted from 1; does nothing by default."""

    def checkpointed_names(self) -> set[str]:
        """Return the names of the weights that a checkpoint must hold; none if the reference does not move."""
        return set()


class InMemoryReference(ReferenceModel):
    """A reference with a model in memory, which has no gradients and keeps no graphs."""

    def __init__(self, model: PreTrainedModel, description: str, initial_distance: float) -> None:
        """Freeze the model."""
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.sha256 = weights_sha256(model)
        self.description = description
        self.initial_distance = initial_distance

    @property
    def owned_models(self) -> dict[str, PreTrainedModel]:
        """The model, as ``reference``."""
        return {"reference": self.model}

    @torch.no_grad()
    def forward(self, batch: Batch) -> Float[Tensor, " scored"]:
        """Return the log-probability of every scored token under the model, in nats."""
        return score(self.model, batch).logps


class FrozenReference(InMemoryReference):
    """A reference that never changes."""

    def halve_weights(self, policy: PreTrainedModel) -> None:
        """Keep in bfloat16 what autocast computes in it anyway; for the weights of the policy that decides itself."""
        halve_frozen_weights(self.model, may_round=True, keep=set(map(id, policy.parameters())))


class MovingReference(InMemoryReference):
    """A reference that follows the policy.

    Effective weights are averaged, adapter included: the mean of products is not the product of mean factors. Weights
    that do not train are shared with the policy; the others (`moving_names`) are in the checkpoint.
    """

    def __init__(self, policy: PreTrainedModel, alpha: float, tau: int) -> None:
        """Start as a copy of the policy."""
        # with an adapter that has an effect, base + product is computed by one matrix instead of two
        distance = DISTANCE_NONE if lora.equals_base_model(policy) else DISTANCE_ROUNDING
        description = f"moving by {alpha:g} towards the policy every {tau} steps, first a copy of it"
        super().__init__(lora.merge_adapter(policy), description, distance)
        shared = set(map(id, policy.parameters()))
        self.moving_names = [name for name, p in self.model.named_parameters() if id(p) not in shared]
        self.alpha = alpha
        self.tau = tau

    @torch.no_grad()
    def update_from(self, policy: PreTrainedModel, step: int) -> None:
        """Every tau steps set pi_ref <- alpha pi + (1 - alpha) pi_ref (TR-DPO, arXiv 2404.09656, section 3.1)."""
        if step % self.tau == 0:
            for name in self.moving_names:
                self.model.get_parameter(name).lerp_(lora.effective_weight(policy, name), self.alpha)

    def halve_weights(self, policy: PreTrainedModel) -> None:
        """Follow the policy in what it shares; averages keep all of their digits."""
        halve_frozen_weights(self.model, may_round=False, keep=set(map(id, self.model.parameters())))

    def checkpointed_names(self) -> set[str]:
        """Return the names of the weights that move."""
        return {f"model.{name}" for name in self.moving_names}


class AbsentReference(ReferenceModel):
    """The placeholder for losses without a reference: NaN, so that no value can be taken for a log-probability."""

    description = "none, the loss needs none"
    sha256 = ""
    initial_distance = DISTANCE_ANY

    def forward(self, batch: Batch) -> Float[Tensor, " scored"]:
        """Return NaN for every scored token."""
        return torch.full_like(batch.targets, torch.nan, dtype=torch.float32)


class Reference(ABC):
    """The choice of a reference."""

    @abstractmethod
    def build_reference(self, policy: PreTrainedModel, loader: ModelLoader) -> ReferenceModel:
        """Make the reference of a policy that has not been trained yet."""

    def compared_path(self, policy: str) -> str:
        """Return the folder or hub id of the reference of a policy that is loaded from this path."""
        return policy


@dataclass(frozen=True)
class Nothing(Reference):
    """No reference, for losses that need none."""

    def build_reference(self, policy: PreTrainedModel, loader: ModelLoader) -> AbsentReference:
        """Return the placeholder for a reference."""
        return AbsentReference()


@dataclass(frozen=True)
class Copy(Reference):
    """A frozen copy of the policy as it is before training.

    Only weights that train are copied, the others are shared. So the reference of a new adapter is the policy with the
    adapter off, and that of an adapter that is trained further is a frozen copy of the adapter on the same base;
    neither is a second model in memory.
    """

    def build_reference(self, policy: PreTrainedModel, loader: ModelLoader) -> FrozenReference:
        """Copy the weights that train."""
        adapted = bool(lora.adapter_layers(policy))
        if adapted and lora.equals_base_model(policy):
            return AdapterOff().build_reference(policy, loader)
        original = "adapter as it was loaded, on its base" if adapted else "policy"
        return FrozenReference(lora.copy_trainable_weights(policy), f"frozen copy of the {original}", DISTANCE_NONE)


@dataclass(frozen=True)
class AdapterOff(Reference):
    """The policy without its adapter, even an adapter that was trained before; weights are shared."""

    def build_reference(self, policy: PreTrainedModel, loader: ModelLoader) -> FrozenReference:
        """Return the model under the adapter.

        Raises:
            ValueError: The policy has no adapter.
        """
        if not lora.adapter_layers(policy):
            raise ValueError(
                "--model.reference AdapterOff: the policy has no adapter. Leave the option out for a frozen copy, or "
                "add an adapter: --model.adapter LoRA."
            )
        distance = DISTANCE_NONE if lora.equals_base_model(policy) else DISTANCE_ANY
        model = lora.model_without_adapter(policy)
        return FrozenReference(model, "the policy with its adapter off, weights shared", distance)

    def compared_path(self, policy: str) -> str:
        """Return the base model of the adapter; the policy's own path if the adapter is new."""
        return adapter_base_model(policy) or policy


@dataclass(frozen=True)
class Moving(Reference):
    """A reference that follows the policy: TR-DPO (Gorbatovski et al. 2024, arXiv 2404.09656).

    Attributes:
        alpha: Share of the policy in every update, in (0, 1]; 1 copies the policy (the paper's hard update), a smaller
            value is its soft update.
        tau: Optimizer steps between updates; 1 with a small alpha gives an exponential moving average.
    """

    alpha: float = 0.6
    tau: int = 512

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: One is outside its range.
        """
        if not (0 < self.alpha <= 1 and self.tau >= 1):
            raise ValueError(
                f"--model.reference Moving: expected alpha in (0, 1] and tau of at least 1 step, got {self.alpha} and "
                f"{self.tau}."
            )

    def build_reference(self, policy: PreTrainedModel, loader: ModelLoader) -> MovingReference:
        """Start as a copy of the policy."""
        return MovingReference(policy, self.alpha, self.tau)


@dataclass(frozen=True)
class Model(Reference):
    """Another model.

    Attributes:
        path: Folder or hub id.
    """

    path: str

    def build_reference(self, policy: PreTrainedModel, loader: ModelLoader) -> FrozenReference:
        """Load the model.

        Raises:
            ValueError: The vocabularies differ in size.
        """
        model = loader.load_model(self.path)
        size = vocabulary_size(model)
        policy_size = vocabulary_size(policy)
        if size != policy_size:
            raise ValueError(
                f"the reference {self.path!r} has a vocabulary of {size} tokens, the policy one of {policy_size}, so "
                "token ids would mean different things. Choose a reference with the policy's tokenizer."
            )
        return FrozenReference(model, f"the model {self.path}", DISTANCE_ANY)

    def compared_path(self, policy: str) -> str:
        """Return the path of the model."""
        return self.path

"""What of a policy trains: all of it, or a few weights beside frozen ones (LoRA, Hu et al. 2021, arXiv 2106.09685).

Takes a path, gives a policy whose training weights, and no others, require a gradient; turns a policy with an adapter
into ordinary models (the adapter left out, or merged) and into files. Through `peft` inside `transformers`, so that a
policy is a `PreTrainedModel` either way. Knows nothing of losses or training.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_bitsandbytes_available, is_peft_available

from dpo.models.loading import PEFT_PREFIX, ModelLoader, attach_adapter

PEFT_ADAPTER_NAME = "default"  # of the one adapter of a model: what peft calls it where nothing is said
ALL_LINEAR = "all-linear"
"""The target that stands for every linear layer but the head."""


class Adapter(ABC):
    """What of a policy trains.

    Attributes:
        merge: What a run exports: a full model with the adapter merged into it, or the adapter alone.
    """

    merge: bool

    @abstractmethod
    def load_policy(self, loader: ModelLoader, path: str) -> PreTrainedModel:
        """Read the policy; what trains, and nothing else, requires a gradient."""

    def model_to_export(self, policy: PreTrainedModel) -> PreTrainedModel:
        """What a run leaves of its policy."""
        return merge_adapter(policy) if self.merge else policy


@dataclass(frozen=True)
class AsLoaded(Adapter):
    """Nothing is added: all weights train or, where the policy is an adapter, that adapter trains on.

    Attributes:
        four_bits: Keep all weights but those of the adapter in four bits (CUDA only).
        merge: Export a full model with the adapter merged into it.
    """

    four_bits: bool = False
    merge: bool = False

    def load_policy(self, loader: ModelLoader, path: str) -> PreTrainedModel:
        """Read it.

        Raises:
            ValueError: It is no adapter, and four bits were asked for (which cannot train), or that it be merged.
        """
        policy = loader.load_model(path, **(_four_bits() if self.four_bits else {}))
        if (self.four_bits or self.merge) and not adapter_layers(policy):
            option, to_add = ("four_bits", "QLoRA") if self.four_bits else ("merge", "LoRA")
            raise ValueError(f"--model.adapter.{option}: {path!r} is no adapter. To add one: --model.adapter {to_add}.")
        return policy


@dataclass(frozen=True)
class LoRA(Adapter):
    """A product of two thin matrices is added to every target; all other weights are frozen. There is no dropout.

    Attributes:
        r: Width of the thin matrices.
        alpha: The product is multiplied by alpha / r.
        targets: Last parts of the names of the layers; ``all-linear`` is every linear layer but the head.
        merge: Export a full model with the adapter merged into it, instead of the adapter alone.
    """

    r: int = 16
    alpha: int = 32
    targets: tuple[str, ...] = (ALL_LINEAR,)
    merge: bool = False

    def load_policy(self, loader: ModelLoader, path: str) -> PreTrainedModel:
        """Read the policy and add a new adapter, which changes nothing before it is trained."""
        return _add(loader.load_model(path), path, self.r, self.alpha, self.targets)


@dataclass(frozen=True)
class QLoRA(Adapter):
    """LoRA, its r, alpha and targets, on weights of four bits (Dettmers et al. 2023, arXiv 2305.14314). CUDA only."""

    r: int = 16
    alpha: int = 32
    targets: tuple[str, ...] = (ALL_LINEAR,)
    merge = False  # the sum would have to be quantised again: not the model that was trained

    def load_policy(self, loader: ModelLoader, path: str) -> PreTrainedModel:
        """Read the policy in four bits and add a new adapter, which changes nothing before it is trained."""
        return _add(loader.load_model(path, **_four_bits()), path, self.r, self.alpha, self.targets)


def _four_bits() -> dict[str, Any]:
    if not is_bitsandbytes_available():
        raise ValueError("weights of four bits need bitsandbytes: pip install 'dpo-lightning[qlora]'.")
    if not torch.cuda.is_available():
        raise ValueError("weights of four bits need a CUDA device and there is none: use --model.adapter LoRA.")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}


def _add(policy: PreTrainedModel, path: str, r: int, alpha: int, targets: tuple[str, ...]) -> PreTrainedModel:
    if adapter_layers(policy):
        raise ValueError(
            f"--model.policy {path!r} is an adapter already: leave --model.adapter out to train it on "
            "(--model.adapter.four_bits true: in four bits), or give a full model."
        )
    for option, value in (("r", r), ("alpha", alpha)):
        if value < 1:
            raise ValueError(f"--model.adapter.{option}: expected 1 or more, got {value}.")
    if not is_peft_available():
        raise ValueError("adapters need peft: pip install 'dpo-lightning[lora]'.")
    from peft import LoraConfig

    names = _names(policy, targets)
    attach_adapter(policy, LoraConfig(r=r, lora_alpha=alpha, target_modules=names, lora_dropout=0.0, bias="none"))
    return policy


def _names(policy: PreTrainedModel, targets: tuple[str, ...]) -> list[str]:
    """The full names of the layers that targets mean.

    Raises:
        ValueError: A target means none.
    """
    head = policy.get_output_embeddings()
    parts = dict(policy.named_modules())
    linear = [name for name, part in parts.items() if isinstance(part, nn.Linear | Conv1D)]
    found: set[str] = set()
    for target in targets or ("nothing",):
        every = [name for name in linear if parts[name] is not head]
        meant = every if target == ALL_LINEAR else [name for name in parts if f".{name}".endswith(f".{target}")]
        if not meant:
            there = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(f"--model.adapter.targets: expected {ALL_LINEAR} or some of {there}, got {target!r}.")
        found.update(meant)
    return sorted(found)


def adapter_layers(model: PreTrainedModel) -> list[Any]:
    """Every layer that an adapter is on; none for an ordinary model."""
    if not model._hf_peft_config_loaded:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def equals_base_model(model: PreTrainedModel) -> bool:
    """Whether there is no adapter, or it changes nothing: one of its two factors is 0 in every layer."""
    return all(
        any(not p.any() for name, p in layer.named_parameters() if not name.startswith("base_layer."))
        for layer in adapter_layers(model)
    )


def save_model_or_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write a model as Hugging Face files; of a model with an adapter, the adapter alone.

    Not through `save_pretrained` then, which adds all embeddings as soon as the adapter is on one of them.
    """
    if not adapter_layers(model):
        model.save_pretrained(folder)
        return
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model, adapter_name=PEFT_ADAPTER_NAME, save_embedding_layers=False)
    folder.mkdir(exist_ok=True)
    config = model.peft_config[PEFT_ADAPTER_NAME]
    base = Path(str(config.base_model_name_or_path))
    config.base_model_name_or_path = str(base.resolve() if base.is_dir() else base)  # found from any folder
    weights = {f"{PEFT_PREFIX}{name}": p.contiguous() for name, p in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def copy_trainable_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares with the model every weight that does not train."""
    return deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def model_without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """The model under the adapter, sharing with it every weight that does not train."""
    return _plain(model, lambda layer: layer.get_base_layer())


@torch.no_grad()
def merge_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """An ordinary model that computes the same; it shares every weight that the adapter is not on.

    Raises:
        ValueError: The weights that would take the adapter in have four bits.
    """
    return _plain(model, _merge)


@torch.no_grad()
def effective_weight(model: PreTrainedModel, name: str) -> Tensor:
    """The weight that the model computes with, by its name in the merged model."""
    part, _, kind = name.rpartition(".")
    module = model.get_submodule(part)
    return (_merge(module) if module in adapter_layers(model) else module).get_parameter(kind)


def _merge(layer: Any) -> nn.Module:
    """A plain layer of its own with base + product of the factors as its weight (never the factors themselves)."""
    if not layer.get_base_layer().weight.is_floating_point():
        raise ValueError(
            "an adapter cannot be merged into weights of four bits: the sum would have to be quantised again and be "
            "another model. Train it with --model.adapter LoRA."
        )
    own = deepcopy(layer)
    own.merge()
    base: nn.Module = own.get_base_layer()
    return base


def _plain(model: PreTrainedModel, layer: Callable[[Any], nn.Module]) -> PreTrainedModel:
    """A copy with `layer(x)` in the place of every layer x that the adapter is on."""
    adapted = adapter_layers(model)
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    plain = deepcopy(model, shared | {id(each): layer(each) for each in adapted})
    if adapted:
        del plain.peft_config
        plain._hf_peft_config_loaded = False
        plain.config.tie_word_embeddings = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    return plain

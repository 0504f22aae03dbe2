"""Which weights of a policy train: all, or a LoRA adapter beside frozen ones (Hu et al. 2021, arXiv 2106.09685).

An `Adapter` is the user's choice and loads the policy accordingly. The functions below turn a policy with an adapter
into ordinary models (adapter left out, or merged into the weights) and into files. Adapters are added by `peft` inside
`transformers`, so that a policy is a `PreTrainedModel` either way.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_bitsandbytes_available, is_peft_available

from dpo.models.loading import PEFT_PREFIX, ModelLoader, attach_adapter

PEFT_ADAPTER_NAME = "default"  # peft's name for an adapter that is given none
ALL_LINEAR = "all-linear"
"""The target that stands for every linear layer except the output head."""
ExportDtype = Literal["auto", "float32"]


class Adapter(ABC):
    """The choice of the weights that train.

    Attributes:
        merge: Export a full model with the adapter merged into it, instead of the adapter alone.
        export_dtype: Number format of an exported full model: ``auto`` is that of the model that training started from.
    """

    merge: bool
    export_dtype: ExportDtype

    @abstractmethod
    def load_policy(self, loader: ModelLoader, path: str) -> PreTrainedModel:
        """Load the policy from a folder or hub id; exactly the weights that train require a gradient."""

    def model_to_export(self, policy: PreTrainedModel) -> PreTrainedModel:
        """Return what a run exports of its policy: the policy itself, or the policy with its adapter merged.

        A full model is exported in the number format of `export_dtype`; training is in float32 either way.
        """
        exported = merge_adapter(policy) if self.merge else policy
        if adapter_layers(exported):
            return exported
        as_stored = getattr(policy, "stored_dtype", torch.float32)
        return _copy_in_dtype(exported, torch.float32 if self.export_dtype == "float32" else as_stored)


@dataclass(frozen=True)
class AsLoaded(Adapter):
    """Train the policy as it is loaded: all its weights or, if it is an adapter, that adapter.

    Attributes:
        four_bits: Keep all weights except those of the adapter in 4 bits (CUDA only).
        merge: Export a full model with the adapter merged into it.
        export_dtype: Number format of an exported full model: ``auto`` is that of the model that training started
            from, ``float32`` keeps every digit of the trained weights. An adapter alone is always float32.
    """

    four_bits: bool = False
    merge: bool = False
    export_dtype: ExportDtype = field(default="auto", repr=False)  # a checkpoint resumes with any

    def load_policy(self, loader: ModelLoader, path: str) -> PreTrainedModel:
        """Load the policy.

        Raises:
            ValueError: It has no adapter, but is to be in 4 bits (which cannot train) or to be merged.
        """
        policy = loader.load_model(path, **(_four_bits() if self.four_bits else {}))
        if (self.four_bits or self.merge) and not adapter_layers(policy):
            option, new = ("four_bits", "QLoRA") if self.four_bits else ("merge", "LoRA")
            raise ValueError(f"--model.adapter.{option}: {path!r} has no adapter. To add one: --model.adapter {new}.")
        return policy


@dataclass(frozen=True)
class LoRA(Adapter):
    """Add a product of two low-rank matrices to every target layer and freeze all other weights; without dropout.

    Attributes:
        r: Rank of the matrices.
        alpha: The product is scaled by alpha / r.
        targets: Last parts of the names of layers; ``all-linear`` is every linear layer except the output head.
        merge: Export a full model with the adapter merged into it, instead of the adapter alone.
        export_dtype: Number format of an exported full model: ``auto`` is that of the model that training started
            from, ``float32`` keeps every digit of the trained weights. An adapter alone is always float32.
    """

    r: int = 16
    alpha: int = 32
    targets: tuple[str, ...] = (ALL_LINEAR,)
    merge: bool = False
    export_dtype: ExportDtype = field(default="auto", repr=False)  # a checkpoint resumes with any

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: The rank or alpha is below 1.
        """
        _check_rank(self.r, self.alpha)

    def load_policy(self, loader: ModelLoader, path: str) -> PreTrainedModel:
        """Load the policy and add a new adapter, which has no effect until it is trained."""
        return _add_adapter(loader.load_model(path), path, self.r, self.alpha, self.targets)


@dataclass(frozen=True)
class QLoRA(Adapter):
    """LoRA on 4-bit weights (Dettmers et al. 2023, arXiv 2305.14314); CUDA only.

    Attributes:
        r: Rank of the matrices.
        alpha: The product is scaled by alpha / r.
        targets: Last parts of the names of layers; ``all-linear`` is every linear layer except the output head.
    """

    r: int = 16
    alpha: int = 32
    targets: tuple[str, ...] = (ALL_LINEAR,)
    merge = False  # the sum would have to be quantized again and differ from the model that was trained
    export_dtype: ExportDtype = field(default="float32", init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: The rank or alpha is below 1.
        """
        _check_rank(self.r, self.alpha)

    def load_policy(self, loader: ModelLoader, path: str) -> PreTrainedModel:
        """Load the policy in 4 bits and add a new adapter, which has no effect until it is trained."""
        return _add_adapter(loader.load_model(path, **_four_bits()), path, self.r, self.alpha, self.targets)


def _check_rank(r: int, alpha: int) -> None:
    for name, value in (("r", r), ("alpha", alpha)):
        if value < 1:
            raise ValueError(f"--model.adapter.{name}: expected at least 1, got {value}.")


def _four_bits() -> dict[str, Any]:
    if not is_bitsandbytes_available():
        raise ValueError("4-bit weights need bitsandbytes: pip install 'dpo-lightning[qlora]'.")
    if not torch.cuda.is_available():
        raise ValueError("4-bit weights need a CUDA device and there is none: use --model.adapter LoRA.")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}


def _add_adapter(policy: PreTrainedModel, path: str, r: int, alpha: int, targets: tuple[str, ...]) -> PreTrainedModel:
    if adapter_layers(policy):
        raise ValueError(
            f"--model.policy {path!r} is already an adapter: leave --model.adapter out to train it further "
            "(--model.adapter.four_bits true: in 4 bits), or give a full model."
        )
    for option, value in (("r", r), ("alpha", alpha)):
        if value < 1:
            raise ValueError(f"--model.adapter.{option}: expected 1 or more, got {value}.")
    if not is_peft_available():
        raise ValueError("adapters need peft: pip install 'dpo-lightning[lora]'.")
    from peft import LoraConfig

    names = _target_names(policy, targets)
    attach_adapter(policy, LoraConfig(r=r, lora_alpha=alpha, target_modules=names, lora_dropout=0.0, bias="none"))
    return policy


def _target_names(policy: PreTrainedModel, targets: tuple[str, ...]) -> list[str]:
    """Return the full names of the layers that the targets match.

    Raises:
        ValueError: A target matches no layer.
    """
    head = policy.get_output_embeddings()
    parts = dict(policy.named_modules())
    linear = [name for name, part in parts.items() if isinstance(part, nn.Linear | Conv1D)]
    names: set[str] = set()
    for target in targets or ("nothing",):
        if target == ALL_LINEAR:
            matches = [name for name in linear if parts[name] is not head]
        else:
            matches = [name for name in parts if f".{name}".endswith(f".{target}")]
        if not matches:
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(f"--model.adapter.targets: expected {ALL_LINEAR} or some of {known}, got {target!r}.")
        names.update(matches)
    return sorted(names)


def adapter_layers(model: PreTrainedModel) -> list[Any]:
    """Return every layer that has an adapter; none for an ordinary model."""
    if not model._hf_peft_config_loaded:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def equals_base_model(model: PreTrainedModel) -> bool:
    """Return whether there is no adapter or it has no effect, as one of its two factors is 0 in every layer."""
    return all(
        any(not p.any() for name, p in layer.named_parameters() if not name.startswith("base_layer."))
        for layer in adapter_layers(model)
    )


def save_model_or_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write a model as Hugging Face files; of a model with an adapter, the adapter alone.

    An adapter is not written by `save_pretrained`, which adds all embeddings as soon as one of them has an adapter.
    """
    if not adapter_layers(model):
        model.save_pretrained(folder)
        return
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model, adapter_name=PEFT_ADAPTER_NAME, save_embedding_layers=False)
    folder.mkdir(exist_ok=True)
    config: Any = deepcopy(model.peft_config[PEFT_ADAPTER_NAME])
    config.task_type = "CAUSAL_LM"  # without it peft's Auto classes do not know what to load
    if isinstance(config.target_modules, set):  # whose order differs from process to process
        config.target_modules = sorted(config.target_modules)
    weights = {f"{PEFT_PREFIX}{name}": p.contiguous() for name, p in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def _copy_in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model itself if it is in this number format, else a copy on the CPU with its parameters in it."""
    if all(p.dtype == dtype for p in model.parameters()):
        return model
    converted = {id(p): nn.Parameter(p.detach().to("cpu", dtype), requires_grad=False) for p in model.parameters()}
    return deepcopy(model, converted)


def copy_trainable_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model that shares with it every weight that does not train."""
    return deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def model_without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model under the adapter, sharing with it every weight that does not train."""
    return _replace_adapter_layers(model, lambda layer: layer.get_base_layer())


@torch.no_grad()
def merge_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Return an ordinary model that computes the same, sharing every frozen weight of layers without an adapter.

    Raises:
        ValueError: The adapter is on 4-bit weights.
    """
    return _replace_adapter_layers(model, _merge_layer)


@torch.no_grad()
def effective_weight(model: PreTrainedModel, name: str) -> Tensor:
    """Return the weight that the model computes with, adapter included.

    Args:
        model: A model with or without an adapter.
        name: Name of the weight in the merged model.
    """
    part, _, parameter = name.rpartition(".")
    module = model.get_submodule(part)
    return (_merge_layer(module) if module in adapter_layers(model) else module).get_parameter(parameter)


def _merge_layer(layer: Any) -> nn.Module:
    """Return a new plain layer whose weight is the base weight plus the product of the adapter's factors."""
    if not layer.get_base_layer().weight.is_floating_point():
        raise ValueError(
            "an adapter cannot be merged into 4-bit weights: the sum would have to be quantized again and be another "
            "model. Train it with --model.adapter LoRA."
        )
    merged = deepcopy(layer)
    merged.get_base_layer().float()  # it may be kept in bfloat16
    merged.merge()
    base: nn.Module = merged.get_base_layer()
    return base


def _replace_adapter_layers(model: PreTrainedModel, replace: Callable[[Any], nn.Module]) -> PreTrainedModel:
    """Return an ordinary model in which every layer with an adapter is replaced; weights that do not train are shared.

    The layers and weights enter `deepcopy` as objects that were copied already, so every reference to them follows.
    """
    adapted = adapter_layers(model)
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    plain = deepcopy(model, shared | {id(layer): replace(layer) for layer in adapted})
    if adapted:
        del plain.peft_config
        plain._hf_peft_config_loaded = False
        plain.config.tie_word_embeddings = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    return plain

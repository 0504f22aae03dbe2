"""Load causal language models, their adapters and tokenizers from a folder or the hub.

Weights are read from safetensors, and no code that comes with a model is run, unless an option of `ModelLoader` allows
it. Options that apply to a loaded model as a whole (compiled layers, recomputation, the hash of its weights) are here
too.
"""

import hashlib
import json
import os
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file, find_adapter_config_file

from dpo import quickstart
from dpo.models.chat_template import remove_hh_template
from dpo.models.hub_errors import UNREADABLE_FROM_HUB, explain_hub_error, hub_error_line

WEIGHT_ALIGNMENT = 64  # bytes; torch allocates at multiples of it
PEFT_PREFIX = "base_model.model."  # of weight names in an adapter's file


def resolve_model_path(path: str) -> str:
    """Return a folder or hub id as it is, with ``~`` expanded; ``quickstart`` stands for the policy in the package."""
    return str(quickstart.POLICY_FOLDER) if path == "quickstart" else os.path.expanduser(path)


def attach_adapter(model: PreTrainedModel, adapter: Any) -> None:
    """Add an adapter to a model; its weights train in float32, all others are frozen, and dropout stays off.

    They are float32 even beside 4-bit weights, because small updates are lost in bfloat16.

    Args:
        model: The model to add it to.
        adapter: The adapter's peft configuration.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set")  # peft corrects it itself
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # merging unties the head
        model.add_adapter(adapter)
    for parameter in model.eval().parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def adapter_base_model(path: str) -> str | None:
    """Return the model that the adapter at a path was trained on; None if there is no adapter.

    Args:
        path: Folder or hub id.

    Raises:
        ValueError: The adapter is more than LoRA, or the path is neither a folder nor a hub id.
    """
    folder = resolve_model_path(path)
    try:
        file = find_adapter_config_file(folder, local_files_only=Path(folder).is_dir())
    except UNREADABLE_FROM_HUB as error:
        reason = hub_error_line(error)
        raise ValueError(f"expected the folder of a model or its hub id, got {path!r}: {reason}") from error
    if file is None:
        return None
    config = json.loads(Path(file).read_text(encoding="utf-8"))
    if config["peft_type"] != "LORA" or config.get("modules_to_save"):
        raise ValueError(f"{path!r}: expected a LoRA adapter without modules_to_save, got {config['peft_type']}.")
    return str(config["base_model_name_or_path"])


@dataclass(frozen=True)
class ModelLoader:
    """Loads models and tokenizers.

    Attributes:
        trust_remote_code: Run Python code that comes with a model.
        pickled_weights: Also read weights that are not safetensors (unpickling can run code).
    """

    trust_remote_code: bool = False
    pickled_weights: bool = False

    def _options(self, path: str) -> dict[str, Any]:
        return {"trust_remote_code": self.trust_remote_code, "local_files_only": Path(path).is_dir()}

    def load_model(self, path: str, **options: Any) -> PreTrainedModel:
        """Load a causal language model in float32 and in eval mode, as scoring and training both need dropout off.

        The number format that its configuration names is kept as the model's attribute `stored_dtype`.

        An adapter is loaded onto the model that it was trained on, whose weights are then frozen.

        Args:
            path: Folder or hub id of a model or of a LoRA adapter.
            options: Passed on to `from_pretrained`.

        Raises:
            ValueError: There is no such model, or it cannot be read with these options.
        """
        path = resolve_model_path(path)
        base = adapter_base_model(path)
        if base is not None:
            return self._load_adapter(self.load_model(base, **options), path)
        loaded: Any  # with output_loading_info a pair, which the annotations of transformers do not say
        try:
            stored_dtype = AutoConfig.from_pretrained(path, **self._options(path)).dtype
            loaded = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=torch.float32,
                use_safetensors=None if self.pickled_weights else True,
                output_loading_info=True,
                **self._options(path),
                **options,
            )
        except (*UNREADABLE_FROM_HUB, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            # a RuntimeError: wrong shapes
            if reason := explain_hub_error(error):
                raise ValueError(f"cannot read a causal language model from {path!r}: {reason}") from error
            raise ValueError(
                f"cannot read a causal language model from {path!r}: {error}\nExpected a folder or hub id with "
                "config.json and safetensors weights. For sources that you trust, --model.pickled_weights true also "
                "reads .bin files and --model.trust_remote_code true runs code that comes with the model."
            ) from error
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"the weights in {path!r} are incomplete: {len(missing)} are missing and would be random "
                f"({', '.join(missing[:3])}, ...). Download or export the model again."
            )
        _align(model)
        if caps_scores(model):
            model.set_attn_implementation("eager")
        model.stored_dtype = stored_dtype or torch.float32
        return model.eval()  # type: ignore[no-any-return]

    def _load_adapter(self, model: PreTrainedModel, path: str) -> PreTrainedModel:
        options: dict[str, Any] = {"local_files_only": Path(path).is_dir()}
        try:
            from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict

            if not self.pickled_weights:
                # raises if there is none, where peft would read a .bin file
                cached_file(path, "adapter_model.safetensors", **options)
            weights = load_peft_weights(path, device="cpu", **options)
            attach_adapter(model, PeftConfig.from_pretrained(path, inference_mode=False, **options))
            weights = {name.removeprefix(PEFT_PREFIX): weight for name, weight in weights.items()}
            result: Any = set_peft_model_state_dict(model, weights)
        except (*UNREADABLE_FROM_HUB, ValueError, ImportError, RuntimeError) as error:
            if reason := explain_hub_error(error):
                raise ValueError(f"cannot read an adapter from {path!r}: {reason}") from error
            raise ValueError(
                f"cannot read an adapter from {path!r}: {error}\nExpected adapter_config.json and "
                "adapter_model.safetensors that fit the base model, and peft: pip install 'dpo-lightning[lora]'."
            ) from error
        unmatched = [*result.unexpected_keys, *(name for name in result.missing_keys if ".lora_" in name)]
        if unmatched:
            raise ValueError(f"the adapter {path!r} does not fit its base model: no counterpart for {unmatched[:3]}.")
        return model

    def load_tokenizer(self, path: str) -> PreTrainedTokenizerBase:
        """Load the tokenizer of a model; an adapter without one uses that of its base model.

        The chat template that an export adds is left out: dialogues are rendered here as they were in training.

        Raises:
            ValueError: There is no tokenizer.
        """
        path = resolve_model_path(path)
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **self._options(path))
        except (*UNREADABLE_FROM_HUB, ValueError) as error:
            base = adapter_base_model(path)
            if base is not None:
                return self.load_tokenizer(base)
            reason = explain_hub_error(error) or error
            raise ValueError(f"cannot read a tokenizer from {path!r}: {reason}") from error
        remove_hh_template(tokenizer)
        return tokenizer


def caps_scores(model: PreTrainedModel) -> bool:
    """Return whether a model bounds attention scores, which sdpa does not, though older transformers let it be used."""
    return bool(getattr(model.config.get_text_config(), "attn_logit_softcapping", None))


def _align(model: PreTrainedModel) -> None:
    """Copy weights that a mapped file has at unaligned addresses, where products may round differently."""
    for parameter in model.parameters():
        if parameter.data_ptr() % WEIGHT_ALIGNMENT:
            parameter.data = parameter.data.clone()


def prepare_layers(model: PreTrainedModel, compile_layers: bool, gradient_checkpointing: bool) -> None:
    """Compile every layer, or keep only its inputs and recompute the rest in the backward pass, or both.

    Layers are not recomputed through transformers, which does so in train mode only, where dropout is on.

    Raises:
        ValueError: The model does not mark its layers as `GradientCheckpointingLayer`.
    """
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers and (compile_layers or gradient_checkpointing):
        option = "compile" if compile_layers else "gradient_checkpointing"
        raise ValueError(f"--model.{option}: {type(model).__name__} does not say what its layers are. Leave it out.")
    # Recomputation wraps the compiled code, so that the reference, which recomputes nothing, runs the same kernels.
    forward = "_compiled_call_impl" if compile_layers else "forward"
    for layer in layers:
        if compile_layers:
            layer.compile(dynamic=True)
        if gradient_checkpointing:
            setattr(layer, forward, partial(checkpoint, getattr(layer, forward), use_reentrant=False))


def context_length(model: PreTrainedModel) -> int | None:
    """Return the maximum number of tokens that a model was made for; None if its configuration names no limit."""
    config = model.config.get_text_config()  # which also maps GPT-2's own name of the limit to this one
    return getattr(config, "max_position_embeddings", None)


def read_end_ids(path: str) -> list[int]:
    """Return the token ids that end an answer by a model's generation config; empty if it has none."""
    try:
        ends = GenerationConfig.from_pretrained(resolve_model_path(path)).eos_token_id
    except OSError:
        base = adapter_base_model(path)
        return read_end_ids(base) if base is not None else []
    return ends if isinstance(ends, list) else [ends] if isinstance(ends, int) else []


def weights_sha256(model: torch.nn.Module) -> str:
    """Return the SHA-256 of the names, types, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

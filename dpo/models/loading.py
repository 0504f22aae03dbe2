"""A folder or a hub id -> a causal language model, its tokenizer, and the hash of its weights.

Weights are read from safetensors and no code that comes with a model is run, unless the user says otherwise by name.
"""

import hashlib
import json
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file, find_adapter_config_file

from dpo import quickstart


def resolve_model_path(path: str) -> str:
    """A folder or hub id as it is; the word ``quickstart`` stands for the policy that the package ships."""
    return (
        str(quickstart.POLICY_FOLDER)
        if path == "quickstart"
        else str(Path(path).expanduser())
        if path[:1] == "~"
        else path
    )


def attach_adapter(model: PreTrainedModel, adapter: Any) -> None:
    """Put an adapter on, by its peft configuration: its weights train in float32, all others are frozen.

    Float32 also beside weights of four bits: small updates are lost in bfloat16. Dropout stays off.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set")  # peft sets it right itself
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # a merged head is untied
        model.add_adapter(adapter)
    for parameter in model.eval().parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def adapter_base_model(path: str) -> str | None:
    """The model that the adapter in a folder or on the hub was trained on; None where there is no adapter.

    Raises:
        ValueError: It is an adapter that is more than LoRA, or neither a folder nor a hub id.
    """
    try:
        file = find_adapter_config_file(
            resolve_model_path(path), local_files_only=Path(resolve_model_path(path)).is_dir()
        )
    except OSError as error:
        raise ValueError(f"expected the folder of a model or its hub id, got {path!r}: {error}") from error
    if file is None:
        return None
    config = json.loads(Path(file).read_text(encoding="utf-8"))
    if config["peft_type"] != "LORA" or config.get("modules_to_save"):
        raise ValueError(f"{path!r}: expected a LoRA adapter without modules_to_save, got {config['peft_type']}.")
    return str(config["base_model_name_or_path"])


WEIGHT_ALIGNMENT = 64  # bytes, of what torch allocates
PEFT_PREFIX = "base_model.model."  # of the names in an adapter's file


@dataclass(frozen=True)
class ModelLoader:
    """How models are read.

    Attributes:
        trust_remote_code: Run Python code that comes with a model.
        pickled_weights: Also read weights that are not safetensors (unpickling can run code).
    """

    trust_remote_code: bool = False
    pickled_weights: bool = False

    def _options(self, path: str) -> dict[str, Any]:
        return {"trust_remote_code": self.trust_remote_code, "local_files_only": Path(path).is_dir()}

    def load_model(self, path: str, **options: Any) -> PreTrainedModel:
        """Read a causal language model in float32, in eval mode: scoring and training both need every dropout off.

        An adapter is read onto the model that it was trained on, whose weights are then frozen.

        Args:
            path: Folder or hub id of a model or of a LoRA adapter.
            more: Passed on to `from_pretrained`.

        Raises:
            ValueError: There is no such model, or it cannot be read as asked.
        """
        path = resolve_model_path(path)
        base = adapter_base_model(path)
        if base is not None:
            return self._adapted(self.load_model(base, **options), path)
        safe = None if self.pickled_weights else True
        read: Any  # the model and what of it was found: declared as the model alone
        try:
            read = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=torch.float32,
                use_safetensors=safe,
                output_loading_info=True,
                **self._options(path),
                **options,
            )
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:  # a kernel, other shapes
            raise ValueError(
                f"cannot read a causal language model from {path!r}: {error}\nExpected a folder or hub id with "
                "config.json and safetensors weights (--model.pickled_weights true also reads .bin files, "
                "--model.trust_remote_code true runs code that comes with the model: only for sources you trust)."
            ) from error
        model, found = read
        if lost := sorted(found["missing_keys"]):
            raise ValueError(
                f"the weights in {path!r} are not all of the model: {len(lost)} are missing, which would be random "
                f"({', '.join(lost[:3])}, ...). Fetch or export it again."
            )
        _align(model)
        return model.eval()  # type: ignore[no-any-return]

    def _adapted(self, model: PreTrainedModel, path: str) -> PreTrainedModel:
        where: dict[str, Any] = {"local_files_only": Path(path).is_dir()}
        try:
            from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict

            if not self.pickled_weights:
                cached_file(path, "adapter_model.safetensors", **where)  # or a .bin file would be read instead
            weights = load_peft_weights(path, device="cpu", **where)
            attach_adapter(model, PeftConfig.from_pretrained(path, inference_mode=False, **where))
            weights = {name.removeprefix(PEFT_PREFIX): weight for name, weight in weights.items()}
            found: Any = set_peft_model_state_dict(model, weights)
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            raise ValueError(
                f"cannot read an adapter from {path!r}: {error}\nExpected adapter_config.json and "
                "adapter_model.safetensors that fit the base model, and peft: pip install 'dpo-lightning[lora]'."
            ) from error
        lost = [*found.unexpected_keys, *(name for name in found.missing_keys if ".lora_" in name)]
        if lost:
            raise ValueError(f"the adapter {path!r} does not fit its base model: no counterpart for {lost[:3]}.")
        return model

    def load_tokenizer(self, path: str) -> PreTrainedTokenizerBase:
        """Read the tokenizer of a model; an adapter without one has that of its base.

        Raises:
            ValueError: There is none.
        """
        path = resolve_model_path(path)
        try:
            return AutoTokenizer.from_pretrained(path, **self._options(path))
        except (OSError, ValueError) as error:
            base = adapter_base_model(path)
            if base is not None:
                return self.load_tokenizer(base)
            raise ValueError(f"cannot read a tokenizer from {path!r}: {error}") from error


def _align(model: PreTrainedModel) -> None:
    """Copy weights that lie in a mapped file at any address: a product may round otherwise than with a copy of them."""
    for parameter in model.parameters():
        if parameter.data_ptr() % WEIGHT_ALIGNMENT:
            parameter.data = parameter.data.clone()


def prepare_layers(model: PreTrainedModel, compile_layers: bool, gradient_checkpointing: bool) -> None:
    """Compile every layer, or keep only its inputs and compute the rest again in the backward pass.

    Not through transformers, which recomputes in train mode (with dropout) only.

    Raises:
        ValueError: The model does not say what its layers are.
    """
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers and (compile_layers or gradient_checkpointing):
        option = "compile" if compile_layers else "gradient_checkpointing"
        raise ValueError(f"--model.{option}: {type(model).__name__} does not say what its layers are. Leave it out.")
    for layer in layers:
        if compile_layers:
            layer.compile(dynamic=True)
        if (
            gradient_checkpointing
        ):  # around the compiled code: the reference, which recomputes nothing, runs the same kernels
            run = "_compiled_call_impl" if compile_layers else "forward"
            setattr(layer, run, partial(checkpoint, getattr(layer, run), use_reentrant=False))


def read_end_ids(path: str) -> list[int]:
    """The ids at which the model's generation config stops; none where there is no such file."""
    try:
        ends = GenerationConfig.from_pretrained(resolve_model_path(path)).eos_token_id
    except OSError:
        base = adapter_base_model(path)
        return read_end_ids(base) if base is not None else []
    return ends if isinstance(ends, list) else [ends] if isinstance(ends, int) else []


def weights_sha256(model: torch.nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

"""A folder or a hub id -> a causal language model, its tokenizer, and the hash of its weights.

Weights are read from safetensors and no code that comes with a model is run, unless the user says otherwise by name.
"""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo import quickstart


def locate(path: str) -> str:
    """A folder or hub id as it is; the word ``quickstart`` stands for the policy that the package ships."""
    return str(quickstart.POLICY) if path == "quickstart" else str(Path(path).expanduser()) if path[:1] == "~" else path


@dataclass(frozen=True)
class Loader:
    """How models are read.

    Attributes:
        trust_remote_code: Run Python code that comes with a model.
        pickled_weights: Also read weights that are not safetensors (unpickling can run code).
    """

    trust_remote_code: bool = False
    pickled_weights: bool = False

    def _options(self, path: str) -> dict[str, Any]:
        return {"trust_remote_code": self.trust_remote_code, "local_files_only": Path(path).is_dir()}

    def model(self, path: str) -> PreTrainedModel:
        """Read a causal language model in float32, in eval mode: scoring and training both need every dropout off.

        Raises:
            ValueError: There is no such model, or it cannot be read as asked.
        """
        path = locate(path)
        safe = None if self.pickled_weights else True
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, use_safetensors=safe, **self._options(path)
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"cannot read a causal language model from {path!r}: {error}\nExpected a folder or hub id with "
                "config.json and safetensors weights (--model.pickled_weights true also reads .bin files, "
                "--model.trust_remote_code true runs code that comes with the model: only for sources you trust)."
            ) from error
        return model.eval()  # type: ignore[no-any-return]

    def tokenizer(self, path: str) -> PreTrainedTokenizerBase:
        """Read the tokenizer of a model.

        Raises:
            ValueError: There is none.
        """
        path = locate(path)
        try:
            return AutoTokenizer.from_pretrained(path, **self._options(path))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read a tokenizer from {path!r}: {error}") from error


def adapt_layers(model: PreTrainedModel, compiled: bool, recomputed: bool) -> None:
    """Compile every layer, or keep only its inputs and compute the rest again in the backward pass.

    Not through transformers, which recomputes in train mode (with dropout) only.
    """
    for layer in model.modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        if compiled:
            layer.compile(dynamic=True)
        if recomputed:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def end_ids(path: str) -> list[int]:
    """The ids at which the model's generation config stops; none where there is no such file."""
    try:
        ends = GenerationConfig.from_pretrained(locate(path)).eos_token_id
    except OSError:
        return []
    return ends if isinstance(ends, list) else [ends] if isinstance(ends, int) else []


def weights_sha256(model: torch.nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

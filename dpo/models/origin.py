"""Exported policies: a Hugging Face folder with a record of how the policy was trained, ``origin.json``.

The record tells whoever serves the folder what to compare the policy with, how rewards are scaled and how dialogues
become text.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpo.files import write_atomically
from dpo.models.chat_template import make_hh_template
from dpo.models.checkpoint_io import read_checkpoint
from dpo.models.loading import ModelLoader, resolve_model_path
from dpo.models.lora import merge_adapter, save_model_or_adapter

ORIGIN_FILE = "origin.json"
DEFAULT_BETA = 0.1  # scale of rewards if nothing else gives one


@dataclass(frozen=True)
class PolicyOrigin:
    """How a policy was trained; the contents of ``origin.json``.

    Attributes:
        base: Folder or hub id of the model that training started from.
        reference: Folder or hub id of the model that the policy is compared with.
        has_reference: Whether the policy was trained against that model; if not, the model only stands in for one.
        moving: Whether the reference moved during training. Its final weights are in the run's last checkpoint.
        beta: Scale of the rewards.
        format: How dialogues become text: ``hh``, ``chat``, ``plain`` or ``auto``.
    """

    base: str
    reference: str
    has_reference: bool = True
    moving: bool = False
    beta: float = DEFAULT_BETA
    format: Any = "auto"


@dataclass(frozen=True)
class ServedPolicy:
    """A policy and the reference to compare it with, as paths.

    Attributes:
        policy_path: Folder or hub id of the policy.
        reference_path: Folder or hub id of the model that it is compared with.
        has_reference: Whether the policy was trained against that model, or the user named it.
        reference_checkpoint: Checkpoint with the weights of a reference that moved; None if it did not.
        beta: Scale of the rewards.
        format: How dialogues become text: ``hh``, ``chat``, ``plain`` or ``auto``.
    """

    policy_path: str
    reference_path: str
    has_reference: bool = True
    reference_checkpoint: Path | None = None
    beta: float = DEFAULT_BETA
    format: Any = "auto"

    @property
    def reference_note(self) -> str:
        """A sentence on what is special about the reference; empty if nothing is."""
        if self.reference_checkpoint:
            return f"The reference moved during training; this is its final state ({self.reference_checkpoint})."
        if not self.has_reference:
            return "The policy was trained without a reference; the model before training stands in for one."
        return ""


def save_policy(
    folder: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, origin: PolicyOrigin
) -> None:
    """Write the files of `write_policy_files` to a folder; what else is in it stays.

    Raises:
        ValueError: There is a file of that name.
    """
    folder = Path(folder).expanduser().resolve()
    if folder.is_file():
        raise ValueError(f"save_pretrained: expected a folder, got the file {folder}.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        with write_atomically(folder) as scratch:
            write_policy_files(scratch, model, tokenizer, origin)
        return
    with TemporaryDirectory(dir=folder, prefix=".saving-") as scratch_name:
        scratch = Path(scratch_name)
        write_policy_files(scratch, model, tokenizer, origin)
        for file in scratch.iterdir():
            file.replace(folder / file.name)


def write_policy_files(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, origin: PolicyOrigin
) -> None:
    """Write weights (of a model with an adapter, the adapter alone), tokenizer and origin, readable by everybody.

    A tokenizer without a chat template gets one that renders messages as the policy was trained on them, and the
    generation config the token ids that end an answer.
    """
    save_model_or_adapter(model, folder)
    _add_end_of_sequence(folder, model, tokenizer)
    tokenizer.save_pretrained(folder)
    template = make_hh_template(tokenizer) if tokenizer.chat_template is None and origin.format == "hh" else None
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / ORIGIN_FILE).write_text(json.dumps(asdict(origin), indent=2) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        os.chmod(file, 0o644)  # safetensors writes 0600


def _add_end_of_sequence(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let generation end at the tokenizer's end of sequence too, which ends every answer in training."""
    known = model.generation_config.eos_token_id
    ends = known if isinstance(known, list) else [] if known is None else [known]
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id in ends:
        return
    config = GenerationConfig.from_dict(model.generation_config.to_dict())
    config.eos_token_id = [tokenizer.eos_token_id, *ends]
    config.save_pretrained(folder)


def find_policy(path: str, reference: str | None = None) -> ServedPolicy:
    """Find a policy and its reference.

    Args:
        path: Folder or hub id of the policy.
        reference: Compare with this model, whatever the policy was trained against.

    Raises:
        ValueError: The policy has no record of its reference, or the reference is gone.
    """
    path = resolve_model_path(path)
    file = Path(path) / ORIGIN_FILE
    origin = _read_origin(file) if file.is_file() else None
    if reference is not None:
        known = origin or PolicyOrigin(path, reference)
        return ServedPolicy(path, resolve_model_path(reference), beta=known.beta, format=known.format)
    if origin is None:
        raise ValueError(
            f"{path} has no {ORIGIN_FILE} that says what it was trained against: name a model with --reference."
        )
    checkpoint = Path(path).resolve().parent / "checkpoints" / "last.ckpt" if origin.moving else None
    if checkpoint and not checkpoint.is_file():
        raise ValueError(
            f"The reference of {path} moved during training and {checkpoint}, which holds it, is gone: name a model "
            "with --reference."
        )
    reference = resolve_model_path(origin.reference)
    return ServedPolicy(path, reference, origin.has_reference, checkpoint, origin.beta, origin.format)


def trained_format(path: str) -> Any:
    """Return how dialogues became text when a policy was trained; ``auto`` if it has no record of that."""
    file = Path(path) / ORIGIN_FILE
    return _read_origin(file).format if file.is_file() else "auto"


def _read_origin(file: Path) -> PolicyOrigin:
    try:
        return PolicyOrigin(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} cannot be read ({error}). Export again, or name a model with --reference.") from error


def load_policy_and_reference(served: ServedPolicy) -> dict[str, PreTrainedModel]:
    """Load a policy and its reference, both as they were at the end of training, by role.

    Raises:
        ValueError: A model or the checkpoint of the reference is missing or cannot be read.
    """
    paths = {"policy": served.policy_path, "reference": served.reference_path}
    models = {role: ModelLoader().load_model(path, attn_implementation="sdpa") for role, path in paths.items()}
    if served.reference_checkpoint:
        models["reference"] = _load_moved_reference(models["reference"], served.reference_checkpoint)
    return models


def _load_moved_reference(start: PreTrainedModel, checkpoint: Path) -> PreTrainedModel:
    model = merge_adapter(start)
    prefix = "reference.model."
    weights = read_checkpoint(checkpoint)["state_dict"]
    moved = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    if not moved or model.load_state_dict(moved, strict=False).unexpected_keys:
        raise ValueError(f"{checkpoint} does not hold the weights of the reference: name a model with --reference.")
    return model

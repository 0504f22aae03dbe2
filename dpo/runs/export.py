"""The end of a run -> a Hugging Face folder that anything can load, and back: how such a folder came about.

Takes the policy, its tokenizer and the run; writes weights, tokenizer, the resolved configuration and a model card with
the measured numbers. The folder is complete or absent. Reading one, no class that its configuration names is imported.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo import __version__, losses
from dpo.files import write_atomically
from dpo.losses.base import PolicyLoss, ReferenceLoss
from dpo.models.loading import ModelLoader, adapter_base_model, resolve_model_path
from dpo.models.lora import merge_adapter, save_model_or_adapter
from dpo.models.reference import AdapterOff, Moving
from dpo.runs import results
from dpo.runs.checkpoint_io import AtomicCheckpointIO
from dpo.runs.folder import Run


def export_run(
    run: Run,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    base: str,
    data: str,
    card_summary: str,
) -> Path:
    """Write `export/` of a run.

    Args:
        run: Where to, and where the numbers come from.
        policy: What was trained; of a policy with an adapter, the adapter alone is written.
        tokenizer: What it was trained with.
        base: The model it started from.
        data: What it was trained on.
        story: How it was trained, in words.
    """
    with write_atomically(run.export_folder) as folder:
        save_model_or_adapter(policy, folder)
        tokenizer.save_pretrained(folder)
        (folder / "train_config.yaml").write_bytes(run.config_path.read_bytes())
        (folder / "README.md").write_text(str(model_card(run, base, data, card_summary)), encoding="utf-8")
        for file in folder.iterdir():
            os.chmod(file, 0o644)
    return run.export_folder


def model_card(run: Run, base: str, data: str, card_summary: str) -> ModelCard:
    """The model card: what it is, how it was made, what was measured."""
    local = Path(resolve_model_path(base)).is_dir()
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["dpo"],
        base_model=None if local else base,
    )
    numbers = json.loads(run.results_path.read_text()) if run.results_path.exists() else {}
    lines = [f"| {name} | {value:.4f} |" for name, value in sorted(numbers.items())]
    started = Path(base).name if local else base
    text = f"""---
{metadata.to_yaml()}
---

# {run.folder.name}

`{started}` {card_summary}, on {Path(data).name}, by dpo-lightning {__version__}.
`train_config.yaml` is the whole configuration.

Last measured on the validation and test pairs of this run (nats; rewards: beta times the log-ratio to the reference):

| metric | value |
| --- | ---: |
{chr(10).join(lines) or "| none | |"}

During training:

{results.results_markdown(run.metrics_path)}"""
    return ModelCard(text)


@dataclass(frozen=True)
class PolicyOrigin:
    """Where a policy came from.

    Attributes:
        policy: Folder or hub id.
        reference: The same of what it was trained against, or is to be compared with.
        run: Where its run left what it measured, if there was one.
        moved: The checkpoint with the weights of a reference that moved; None: it is as it lies there.
        compared: It was trained against a reference, or is to be compared with this one.
        beta: What its rewards are scaled with.
        format: How text was made of dialogues: hh, chat or auto.
    """

    policy_path: str
    reference_path: str
    run: Run
    reference_checkpoint: Path | None = None
    has_reference: bool = True
    beta: float = 0.1
    format: Any = "auto"

    @property
    def reference_note(self) -> str:
        """What one should know of the reference, as a sentence; empty where it is what one expects."""
        if self.reference_checkpoint:
            return f"The reference moved during training; it is as it was at the end ({self.reference_checkpoint})."
        if not self.has_reference:
            return "The policy was trained without a reference; what it was before training stands in for one."
        return ""


def read_origin(policy: str, reference: str | None = None) -> PolicyOrigin:
    """Read how a policy came about.

    Args:
        policy: Folder or hub id.
        reference: To be compared with this, whatever it was trained against.

    Raises:
        ValueError: Nothing says what it was trained against, or that is no longer there.
    """
    policy = resolve_model_path(policy)
    file = Path(policy) / "train_config.yaml"
    config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    stage, data = _options(config.get("model")), _options(config.get("data"))
    found = reference or _reference(stage.get("reference"), stage.get("policy"))
    if not found:
        raise ValueError(f"Nothing says what {policy} was trained against: name it with --reference.")
    run = Run(Path(policy).resolve().parent if config else Path(policy))
    follows = reference is None and _name(stage.get("reference")) == Moving.__name__
    moved = run.checkpoint_folder / "last.ckpt" if follows else None
    if moved and not moved.is_file():
        raise ValueError(f"The reference of {policy} moved, and {moved}, which has it, is gone: name a --reference.")
    compared = bool(reference) or _compares(stage.get("loss"))
    return PolicyOrigin(
        policy, resolve_model_path(found), run, moved, compared, _beta(stage.get("loss")), data.get("format", "auto")
    )


def load_policy_and_reference(origin: PolicyOrigin) -> dict[str, PreTrainedModel]:
    """Read the policy and its reference, as it was at the end.

    Raises:
        ValueError: One is not there, or cannot be read.
    """
    paths = {"policy": origin.policy_path, "reference": origin.reference_path}
    read = {name: ModelLoader().load_model(path, attn_implementation="sdpa") for name, path in paths.items()}
    return read | (
        {"reference": _moved(read["reference"], origin.reference_checkpoint)} if origin.reference_checkpoint else {}
    )


def _moved(policy: PreTrainedModel, checkpoint: Path) -> PreTrainedModel:
    """The reference that began as this policy and moved, as it is in a checkpoint."""
    model, place = merge_adapter(policy), "reference.model."
    weights = AtomicCheckpointIO().load_checkpoint(checkpoint)["state_dict"]
    theirs = {name.removeprefix(place): weight for name, weight in weights.items() if name.startswith(place)}
    if not theirs or model.load_state_dict(theirs, strict=False).unexpected_keys:
        raise ValueError(f"{checkpoint} does not hold the reference that moved: name a --reference.")
    return model


def _options(choice: Any) -> dict[str, Any]:
    """The options of a class that was chosen in a configuration; none where nothing or a plain value was."""
    return choice.get("init_args") or {} if isinstance(choice, dict) else {}


def _name(choice: Any) -> str:
    return str(choice.get("class_path", "")).rpartition(".")[2] if isinstance(choice, dict) else ""


def _reference(choice: Any, policy: str | None) -> str | None:
    """Another model, the one below the adapter, or what the policy was before."""
    options = _options(choice)
    if "of" in options:  # log-probabilities of a reference
        return _reference(options["of"], policy)
    below = adapter_base_model(policy) if policy and _name(choice) == AdapterOff.__name__ else None
    return choice if isinstance(choice, str) else options.get("path") or below or policy


def _inside(loss: Any) -> list[Any]:
    """The losses that one is around."""
    options = _options(loss)
    return options.get("losses") or ([options["loss"]] if "loss" in options else [])


def _compares(loss: Any) -> bool:
    """Whether it uses a reference; a supervised stage has no loss to choose."""
    kind = vars(losses).get(_name(loss), ReferenceLoss if loss else PolicyLoss)
    return any(map(_compares, _inside(loss))) if _inside(loss) else not issubclass(kind, PolicyLoss)


def _beta(loss: Any) -> float:
    """Of a loss around others: that of the first which uses a reference, whose rewards it takes, or of the first."""
    inside = _inside(loss)
    if inside:
        return _beta(next(filter(_compares, inside), inside[0]))
    return float(_options(loss).get("beta", PolicyOrigin.beta))

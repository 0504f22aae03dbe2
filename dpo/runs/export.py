"""Export of a run as a Hugging Face folder, with a model card that reports the measured values."""

import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo import __version__
from dpo.files import write_atomically
from dpo.models.loading import resolve_model_path
from dpo.models.origin import PolicyOrigin, write_policy_files
from dpo.runs import results
from dpo.runs.folder import Run


def export_run(
    run: Run,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    origin: PolicyOrigin,
    data: str,
    card_summary: str,
) -> Path:
    """Write ``export/`` in a run's folder, completely or not at all.

    Args:
        run: The run; its metrics and results go into the model card.
        policy: The trained model. Of a model with an adapter, only the adapter is written.
        tokenizer: The policy's tokenizer.
        origin: How the policy was trained; written to origin.json.
        data: Path or name of the training data.
        card_summary: How the policy was trained, for the model card: "trained on preferences with ...".

    Returns:
        The export folder.
    """
    with write_atomically(run.export_folder) as folder:
        folder.mkdir()
        (folder / "train_config.yaml").write_bytes(run.config_path.read_bytes())
        card = model_card(run, origin.base, data, card_summary)
        (folder / "README.md").write_text(str(card), encoding="utf-8")
        write_policy_files(folder, policy, tokenizer, origin)
    return run.export_folder


def model_card(run: Run, base: str, data: str, card_summary: str) -> ModelCard:
    """Return the model card of a run.

    Args:
        run: The run whose results are reported.
        base: Folder or hub id of the model that training started from. A folder is named without its path, and not in
            the metadata, where only hub ids mean anything to others.
        data: Path or name of the training data; only its last part is named.
        card_summary: How the policy was trained; continues a sentence that begins with the base model.
    """
    is_local = Path(resolve_model_path(base)).is_dir()
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["dpo"],
        base_model=None if is_local else base,
    )
    values = json.loads(run.results_path.read_text()) if run.results_path.exists() else {}
    value_rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in sorted(values.items()))
    text = f"""---
{metadata.to_yaml()}
---

# {run.folder.name}

`{Path(base).name if is_local else base}` {card_summary}, on {Path(data).name}, by dpo-lightning {__version__}.
`train_config.yaml` is the whole configuration.

Last measured on the validation and test pairs of this run (nats; rewards: beta times the log-ratio to the reference):

| metric | value |
| --- | ---: |
{value_rows or "| none | |"}

During training:

{results.results_markdown(run.metrics_path)}"""
    return ModelCard(text)

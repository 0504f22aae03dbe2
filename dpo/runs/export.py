"""Export of a run as a Hugging Face folder, with a model card that reports the measured values."""

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo.files import write_atomically
from dpo.models.lora import adapter_layers
from dpo.models.origin import PolicyOrigin, write_policy_files
from dpo.runs.card import HH_PROMPT, QUESTION, TrainingFacts, model_card
from dpo.runs.folder import Run


def export_run(
    run: Run,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    origin: PolicyOrigin,
    data: str,
    card_summary: str,
    facts: TrainingFacts = TrainingFacts(),  # noqa: B008  # frozen
) -> Path:
    """Write ``export/`` in a run's folder, completely or not at all.

    Args:
        run: The run; its metrics and results go into the model card.
        policy: The trained model. Of a model with an adapter, only the adapter is written.
        tokenizer: The policy's tokenizer.
        origin: How the policy was trained; written to origin.json.
        data: Path or name of the training data.
        card_summary: How the policy was trained, for the model card: "trained on preferences with ...".
        facts: What else the model card says about the training; what it says about the export is found out here.

    Returns:
        The export folder.
    """
    with write_atomically(run.export_folder) as folder:
        folder.mkdir()
        (folder / "train_config.yaml").write_bytes(run.config_path.read_bytes())
        (folder / "README.md").touch()  # gets its mode with the others
        write_policy_files(folder, policy, tokenizer, origin)
        is_adapter = bool(adapter_layers(policy))
        prompt, takes_messages = _example_prompt(folder, tokenizer, origin.format)
        facts = replace(
            facts,
            is_adapter=is_adapter,
            dtype="float32" if is_adapter else str(policy.dtype).removeprefix("torch."),
            prompt=prompt,
            takes_messages=takes_messages,
            license=getattr(policy.config, "license", None),
        )
        card = model_card(run, origin.base, data, card_summary, facts)
        (folder / "README.md").write_text(str(card), encoding="utf-8")
    return run.export_folder


def _example_prompt(folder: Path, tokenizer: PreTrainedTokenizerBase, text_format: str) -> tuple[str, bool]:
    """Return a question as the policy was trained to see it, and whether the export renders messages so."""
    if text_format == "chat":
        messages = [{"role": "user", "content": QUESTION}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)), True
    if text_format == "plain":
        return QUESTION, False
    return HH_PROMPT, tokenizer.chat_template is None and (folder / "chat_template.jinja").is_file()

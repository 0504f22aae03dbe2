"""The end of a run -> a Hugging Face folder that anything can load.

Takes the policy, its tokenizer and the run; writes weights, tokenizer, the resolved configuration and a model card with
the measured numbers. The folder is complete or absent.
"""

import json
import os
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo import __version__, report
from dpo.adapters import save
from dpo.models import locate
from dpo.run import Run, complete


def export(
    run: Run,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    base: str,
    data: str,
    story: str,
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
    with complete(run.export) as folder:
        save(policy, folder)
        tokenizer.save_pretrained(folder)
        (folder / "train_config.yaml").write_bytes(run.config.read_bytes())
        (folder / "README.md").write_text(str(card(run, base, data, story)), encoding="utf-8")
        for file in folder.iterdir():
            os.chmod(file, 0o644)
    return run.export


def card(run: Run, base: str, data: str, story: str) -> ModelCard:
    """The model card: what it is, how it was made, what was measured."""
    local = Path(locate(base)).is_dir()
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["dpo"],
        base_model=None if local else base,
    )
    numbers = json.loads(run.results.read_text()) if run.results.exists() else {}
    lines = [f"| {name} | {value:.4f} |" for name, value in sorted(numbers.items())]
    started = Path(base).name if local else base
    text = f"""---
{metadata.to_yaml()}
---

# {run.folder.name}

`{started}` {story}, on {Path(data).name}, by dpo-lightning {__version__}.
`train_config.yaml` is the whole configuration.

Last measured on the validation and test pairs of this run (nats; rewards: beta times the log-ratio to the reference):

| metric | value |
| --- | ---: |
{chr(10).join(lines) or "| none | |"}

During training:

{report.markdown(report.results(run.metrics))}"""
    return ModelCard(text)

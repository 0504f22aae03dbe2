"""The model card of an export: where the policy comes from, how to ask it, how it was trained, what was measured."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from dpo import __version__
from dpo.models.loading import adapter_base_model, resolve_model_path
from dpo.models.origin import ORIGIN_FILE
from dpo.runs import card_sections, results
from dpo.runs.evaluations import SECTION_END, SECTION_START
from dpo.runs.folder import Run, run_of_export
from dpo.runs.loggers import read_metrics

LICENSE_FIELDS = ("license", "license_name", "license_link")
QUESTION = "How do I make tea?"
HH_PROMPT = f"\n\nHuman: {QUESTION}\n\nAssistant:"


@dataclass(frozen=True)
class TrainingFacts:
    """What a model card says about a policy beyond the files of its run.

    Attributes:
        method: Kind of training, ``dpo`` or ``sft``; a tag of the card.
        pair_count: Number of preference pairs in the training split; None if unknown.
        validation_pairs: Number of pairs in the validation split, if all of them are measured; None if unknown.
        data_sha256: Hash of the data files and of how they were tokenized; "" if unknown.
        hardware: Devices that it was trained on, in words; "" if unknown.
        is_adapter: Whether the export is an adapter alone.
        dtype: Number format of the exported weights.
        prompt: A question as the policy was trained to see it, as text.
        takes_messages: Whether the exported tokenizer renders messages so.
        license: Licence that the base's configuration names; None if it names none.
    """

    method: str = "dpo"
    pair_count: int | None = None
    validation_pairs: int | None = None
    data_sha256: str = ""
    hardware: str = ""
    is_adapter: bool = False
    dtype: str = "float32"
    prompt: str = HH_PROMPT
    takes_messages: bool = True
    license: str | None = None


def hardware_in_words(device: torch.device, count: int) -> str:
    """Return the kind of a device and how many of them a run has, such as "2 x NVIDIA H100" or "1 x CPU process"."""
    cuda_name = str(torch.cuda.get_device_name(device)) if device.type == "cuda" else ""
    return f"{count} x {cuda_name or device.type.upper() + ' process'}"


def model_card(run: Run, base: str, data: str, card_summary: str, facts: TrainingFacts = TrainingFacts()) -> ModelCard:
    """Return the model card of a run.

    Args:
        run: The run whose results are reported.
        base: Folder or hub id of the model that training started from. A folder is named without its path, and the
            metadata has the hub id that it goes back to, if there is one.
        data: Path or name of the training data; a path is named by its last part.
        card_summary: How the policy was trained; continues a sentence that begins with the base model.
        facts: What else is known.
    """
    bases = list(_trace_bases(base))
    hub_base = next(filter(_is_hub_id, bases), None)
    parts = data.split(", ")
    datasets = [part for part in parts if _is_hub_id(part) and "/" in part]
    license_fields: dict[str, Any] = _find_license(bases, facts.license)
    values = results.result_values(run)
    data_names = [part if part in datasets else Path(part).name for part in parts]
    eval_results = card_sections.own_results(values, data_names) or None
    metadata = ModelCardData(
        model_name=run.folder.name if eval_results else None,
        eval_results=eval_results,
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[facts.method],
        base_model=hub_base,
        datasets=datasets or None,
        **license_fields,
    )
    start = f"`{_short_name(base)}`" + (f" (which began as `{hub_base}`)" if hub_base not in (None, base) else "")
    licences = {name: _data_licence(part) for name, part in zip(data_names, parts, strict=True)}
    value_rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in sorted(values.items()))
    text = f"""---
{metadata.to_yaml()}
---

# {run.folder.name}

{start} {card_summary}, on {", ".join(data_names)}, by dpo-lightning {__version__}.
{_training_sentence(run, facts)}
`train_config.yaml` is the whole configuration.

## Use

{_usage(facts)}

## Results

{card_sections.own_results_table(run, values, facts.validation_pairs, facts.data_sha256)}
Last measured on the validation and test pairs of this run (nats; rewards: beta times the log-ratio to the reference):

| metric | value |
| --- | ---: |
{value_rows or "| none | |"}

During training:

{results.results_markdown(run.metrics_path)}
## Evaluations

`python -m dpo evaluate --run runs/{run.folder.name} --suite FILE` measures the policy on reward benchmarks and adds the
results here.

{SECTION_START}
{SECTION_END}

## Data

{card_sections.data_section(run)}
## Limits

{card_sections.limits_section(run)}
## Licences

{card_sections.licence_section(license_fields.get("license"), licences)}
## Make it again

```bash
python train.py fit --config train_config.yaml --name {run.folder.name}-again
```
"""
    return ModelCard(text)


def _trace_bases(path: str | None) -> Iterator[str]:
    """Yield a model, the model that it was trained from, and so on, as far as local folders tell."""
    seen: set[str] = set()
    while path and path not in seen:
        yield path
        seen.add(path)
        folder = Path(resolve_model_path(path))
        path = _recorded_base(folder) if folder.is_dir() else None


def _recorded_base(folder: Path) -> str | None:
    """Return the model that a policy folder says it was trained from."""
    try:
        if (folder / ORIGIN_FILE).is_file():
            return str(json.loads((folder / ORIGIN_FILE).read_text(encoding="utf-8"))["base"])
        base = adapter_base_model(str(folder)) or _card_metadata(folder).get("base_model")
    except (ValueError, KeyError):
        return None
    return base[0] if isinstance(base, list) else base


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name != "quickstart" and not Path(name).expanduser().exists()


def _card_metadata(name: str | Path, repo_type: str = "model") -> dict[str, Any]:
    """Return the metadata of the card of a folder or hub id; nothing if there is none that can be read."""
    try:
        folder = Path(resolve_model_path(str(name)))
        local = folder.is_dir()
        file = folder / "README.md" if local else Path(hf_hub_download(str(name), "README.md", repo_type=repo_type))
        return dict(vars(ModelCard(file.read_text(encoding="utf-8")).data)) if file.is_file() else {}
    except (HTTPError, OSError, ValueError):
        return {}


def _find_license(models: list[str], otherwise: str | None) -> dict[str, str]:
    """Return the licence that the card of one of the models gives, nearest first."""
    for metadata in map(_card_metadata, models):
        if metadata.get("license"):
            return {name: metadata[name] for name in LICENSE_FIELDS if name in metadata}
    return {"license": otherwise} if otherwise else {}


def _data_licence(data: str) -> str | None:
    """Return the licence that the card of a data set gives, of a file that of its folder; None if there is none."""
    licence = _card_metadata(Path(data).parent if Path(data).is_file() else data, "dataset").get("license")
    return ", ".join(licence) if isinstance(licence, list) else licence


def _short_name(base: str) -> str:
    """Return how a card names a model: a hub id as it is, an export by its run, another folder by its last part."""
    folder = Path(resolve_model_path(base))
    if not folder.is_dir() or base == "quickstart":
        return base
    return run_of_export(str(folder)).folder.name


def _training_sentence(run: Run, facts: TrainingFacts) -> str:
    """Say on how many pairs, on which hardware and for how long the policy was trained."""
    pairs = "" if facts.pair_count is None else f", from a training split of {facts.pair_count} preference pairs"
    hardware = f", on {facts.hardware}" if facts.hardware else ""
    steps, seconds = _steps_and_seconds(run)
    time = "" if seconds is None else f", which took {_time_in_words(seconds)}"
    content = "an adapter" if facts.is_adapter else "the full model"
    weights = f"The weights, {content}, are in {facts.dtype}; training kept them in float32."
    return f"Trained in {steps} optimizer steps{time}{pairs}{hardware}. {weights}"


def _time_in_words(seconds: float) -> str:
    if seconds < 2:
        return "less than 2 seconds"
    units = {"hours": 3600, "minutes": 60, "seconds": 1}
    unit = next(name for name, size in units.items() if seconds >= 2 * size)
    return f"about {seconds / units[unit]:.0f} {unit}"


def _steps_and_seconds(run: Run) -> tuple[int, float | None]:
    """Return the number of optimizer steps, and how long they took in seconds by the speeds that were logged."""
    rows = read_metrics(run.metrics_path)
    steps = max((int(row["step"]) for row in rows), default=0)
    last, measured, seconds = 0, 0, 0.0
    for row in rows:
        if row.get("train/time/step"):
            covered = int(row["step"]) - last
            last, measured, seconds = (
                last + covered,
                measured + covered,
                seconds + covered * float(row["train/time/step"]),
            )
    return steps, seconds / measured * steps if measured else None


def _usage(facts: TrainingFacts) -> str:
    """Return a program that asks the policy, and the prompt as text."""
    question = repr([{"role": "user", "content": QUESTION}]) if facts.takes_messages else repr(facts.prompt)
    reply = '["content"]' if facts.takes_messages else ""
    answer = f'["generated_text"]{"[-1]" if facts.takes_messages else ""}{reply}'
    template = "its chat template" if facts.takes_messages else "the caller"
    tokenizer = ", tokenizer=policy" if facts.is_adapter else ""  # otherwise it would be that of the base
    install = "transformers peft" if facts.is_adapter else "transformers"
    return f"""```python
# pip install {install}
from transformers import pipeline

policy = "."  # this folder, or the name of the repository that it was pushed to
generate = pipeline("text-generation", model=policy{tokenizer})
prompt = {question}
print(generate(prompt, max_new_tokens=64)[0]{answer})
```

The policy was trained on prompts of this form, which {template} writes:

```python
{facts.prompt!r}
```"""

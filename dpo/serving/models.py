"""What the command line says -> the two models, where they came from and how they were trained.

Takes folders or hub ids. No code that comes with a model is run, weights are safetensors, and there is one attention.
"""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from dpo.models import Loader, locate
from dpo.run import Run

LATEST = Path("runs/latest/export")
RUN_FILES = ("results.csv", "metrics.csv", "results.json", "held_out.jsonl", "config.yaml")
MOST_CONTEXT = 4096  # tokens, where --max-context does not say


@dataclass(frozen=True)
class Origin:
    """What is served.

    Attributes:
        policy: Folder or hub id.
        reference: The same of what it is compared with.
        config: The configuration of the training run; empty where it is not known.
        run: The training run, where its folder lies around the policy's.
    """

    policy: str
    reference: str
    config: dict[str, Any]
    run: Run | None

    @property
    def paths(self) -> dict[str, str]:
        """Both, by the names that clients use."""
        return {"policy": self.policy, "reference": self.reference}

    @property
    def beta(self) -> float:
        """What the run's rewards are scaled with."""
        loss = _options(_options(self.config.get("model")).get("loss"))
        return float(loss.get("beta", 0.1))

    @property
    def format(self) -> Any:
        """How the run made text of dialogues: hh, chat or auto."""
        return _options(self.config.get("data")).get("format", "auto")


def find(model: str | None, reference: str | None, demo: bool) -> Origin:
    """Find policy and reference.

    Raises:
        ValueError: There is no run yet, or nothing says what the policy is compared with.
    """
    if demo:
        return Origin(locate("quickstart"), locate(reference or "quickstart"), {}, None)
    if model is None and not LATEST.is_dir():
        raise ValueError(
            "There is no trained run yet.\n  make fit    trains the built-in example (about two minutes)\n"
            "  python serve.py --demo    serves the model it starts from, as policy and as reference\n"
            "  python serve.py --model FOLDER --reference FOLDER_OR_HUB_ID    serves other models"
        )
    policy = locate(model or str(LATEST))
    file = Path(policy) / "train_config.yaml"
    config = yaml.safe_load(file.read_text()) if file.is_file() else {}
    run = Run(Path(policy).resolve().parent) if config else None
    return Origin(policy, locate(reference or _reference(config)), config, run)


def _options(choice: Any) -> dict[str, Any]:
    """The options of a class that was chosen in a configuration; none where nothing or a plain value was."""
    return choice.get("init_args") or {} if isinstance(choice, dict) else {}


def _reference(config: dict[str, Any]) -> str:
    """What a run was trained against: a model of its own, or what the policy was before."""
    stage = _options(config.get("model"))
    chosen = stage.get("reference")
    named = chosen if isinstance(chosen, str) else _options(chosen).get("path")
    found = named or stage.get("policy")
    if not found:
        raise ValueError("Nothing says what the model was trained against: name it with --reference.")
    return str(found)


def read(path: str, device: str, dtype: str) -> PreTrainedModel:
    """Read a model or adapter for inference, on the device of that name; `auto` is the GPU where there is one.

    Raises:
        ValueError: There is none, or it cannot be read without running code that is not ours.
    """
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        model = Loader().model(path, attn_implementation="sdpa")
    except ImportError as error:  # its configuration asks for a kernel from elsewhere
        raise ValueError(f"cannot read a causal language model from {path!r}: {error}") from error
    moved: PreTrainedModel = torch.nn.Module.to(model, device=place, dtype=getattr(torch, dtype))
    return moved.requires_grad_(False)


def run_report(origin: Origin) -> dict[str, Any]:
    """What the run left behind, as far as it is there: results, metrics (at most 500 rows), values, held-out pairs."""
    folder = origin.run.folder if origin.run else Path(origin.policy)
    texts = {name: file.read_text() if (file := folder / name).is_file() else "" for name in RUN_FILES}
    header, *rows = csv.reader(texts["results.csv"].splitlines() or [""])
    metrics = [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(texts["metrics.csv"].splitlines())]
    return {
        "name": folder.name,
        "results": {"header": header, "rows": rows},
        "metrics": metrics[:: -(-len(metrics) // 500) or 1],
        "values": {k: _number(v) for k, v in json.loads(texts["results.json"] or "{}").items()},
        "held_out": [json.loads(line) for line in texts["held_out.jsonl"].splitlines()],
        "config": texts["config.yaml"],
    }


def _number(value: Any) -> float | None:
    """A finite number, or null."""
    number = float(value or "nan")
    return number if math.isfinite(number) else None

"""What the command line says -> the two models, where they came from and how they were trained.

Takes folders or hub ids. No code that comes with a model is run, weights are safetensors, and the attention is the one
named here, whatever a configuration asks for.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo.models import locate
from dpo.run import Run

LATEST = Path("runs/latest/export")
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
    def beta(self) -> float:
        """What the run's rewards are scaled with."""
        return float(self.config.get("model", {}).get("loss", {}).get("init_args", {}).get("beta", 0.1))

    @property
    def format(self) -> Any:
        """How the run made text of dialogues: hh, chat or auto."""
        return self.config.get("data", {}).get("init_args", {}).get("format", "auto")


def find(model: str | None, reference: str | None, demo: bool) -> Origin:
    """Find policy and reference.

    Raises:
        ValueError: There is no run yet, or nothing says what the policy is compared with.
    """
    if demo:
        return Origin(locate("quickstart"), locate(reference or "quickstart"), {}, None)
    if model is None and not LATEST.is_dir():
        raise ValueError(
            "There is no trained run yet.\n  make fit                  trains the built-in example (about two minutes)\n"
            "  python serve.py --demo    serves the model it starts from, as policy and as reference\n"
            "  python serve.py --model FOLDER --reference FOLDER_OR_HUB_ID    serves other models"
        )
    policy = locate(model or str(LATEST))
    file = Path(policy) / "train_config.yaml"
    config = yaml.safe_load(file.read_text()) if file.is_file() else {}
    run = Run(Path(policy).resolve().parent) if config else None
    return Origin(policy, locate(reference or _reference(config)), config, run)


def _reference(config: dict[str, Any]) -> str:
    """What a run was trained against: a model of its own, or what the policy was before."""
    chosen = config.get("model", {}).get("reference")
    named = chosen if isinstance(chosen, str) else ((chosen or {}).get("init_args") or {}).get("path")
    found = named or config.get("model", {}).get("policy")
    if not found:
        raise ValueError("Nothing says what the model was trained against: name it with --reference.")
    return str(found)


def read(path: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Read a model for inference.

    Raises:
        ValueError: There is none, or it cannot be read as safely as it must.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation="sdpa",
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=Path(path).is_dir(),
        )
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"cannot read a model from {path!r} (--model, --reference): {error}") from error
    return model.to(device).eval().requires_grad_(False)  # type: ignore[no-any-return]

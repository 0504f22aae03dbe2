"""What the command line says -> where the two models lie and how they were trained.

Takes folders or hub ids, reads no weights.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo.models import locate
from dpo.run import Run

LATEST = Path("runs/latest/export")


@dataclass(frozen=True)
class Origin:
    """What is served.

    Attributes:
        policy: Folder or hub id.
        reference: The same of what it is compared with.
        run: Where the training run left what it measured, if it did.
        beta: What its rewards are scaled with.
        format: How it made text of dialogues: hh, chat or auto.
    """

    policy: str
    reference: str
    run: Run
    beta: float = 0.1
    format: Any = "auto"


def find(model: str | None, reference: str | None, demo: bool) -> Origin:
    """Find policy and reference.

    Raises:
        ValueError: There is no run yet, or nothing says what the policy is compared with.
    """
    if demo:
        policy = locate("quickstart")
        return Origin(policy, locate(reference or policy), Run(Path(policy)))
    if model is None and not LATEST.is_dir():
        raise ValueError(
            "There is no trained run yet.\n  make fit    trains the built-in example (about two minutes)\n"
            "  python serve.py --demo    serves the model it starts from, as policy and as reference\n"
            "  python serve.py --model FOLDER --reference FOLDER_OR_HUB_ID    serves other models"
        )
    policy = locate(model or str(LATEST))
    folder, file = Path(policy).resolve(), Path(policy) / "train_config.yaml"
    config = yaml.safe_load(file.read_text()) if file.is_file() else {}
    stage, data = _options(config.get("model")), _options(config.get("data"))
    compared = reference or _reference(stage)
    run = Run(folder.parent if config else folder)
    return Origin(
        policy, locate(compared), run, _options(stage.get("loss")).get("beta", 0.1), data.get("format", "auto")
    )


def _options(choice: Any) -> dict[str, Any]:
    """The options of a class that was chosen in a configuration; none where nothing or a plain value was."""
    return choice.get("init_args") or {} if isinstance(choice, dict) else {}


def _reference(stage: dict[str, Any]) -> str:
    """What a run was trained against: a model of its own, or what the policy was before."""
    chosen = stage.get("reference")
    found = chosen if isinstance(chosen, str) else _options(chosen).get("path") or stage.get("policy")
    if not found:
        raise ValueError("Nothing says what the model was trained against: name it with --reference.")
    return str(found)

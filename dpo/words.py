"""The words of a command line before they are parsed, and what is said where they are refused.

Takes words and errors, gives words and a message. Knows no class and no option but those that name what to train.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
NAMING = (
    "--config",
    "--confi",
    "--conf",
    "--con",
    "--co",
    "-c",
    "--model.policy",
    "--data.path",
)  # argparse takes them


def completed(words: Sequence[str]) -> list[str]:
    """The words; of a `fit` that names neither configuration nor model nor data, with those of the quickstart."""
    named = any(word.split("=")[0].replace(".init_args.", ".") in NAMING for word in words)
    quickstart = ["--config", str(QUICKSTART)] if words[:1] == ["fit"] and not named else []
    return [*words[:1], *quickstart, *words[1:]]


def hand_on(words: Sequence[str]) -> None:
    """Make these the command line, which is parsed here and run again by every process that Lightning starts."""
    sys.argv[1:] = words


def reason(error: BaseException) -> str:
    """What is wrong, without jsonargparse's list of all that the option is not."""
    wrapped = error.__cause__ if "Union subtypes" in str(error) else None
    return reason(wrapped) if wrapped else f"{type(error).__name__}: {error}"

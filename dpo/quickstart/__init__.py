"""What `train.py fit` trains and trains on when nothing is named: a small world made from seeds.

Takes nothing but numbers; gives preference rows in hh-rlhf's format and a small policy that already speaks.
It does not know the trainer. `topics` and `phrases` hold the words, `generator` draws rows, `blank` makes an
untrained policy.
"""

from pathlib import Path

from dpo.quickstart.blank import SFT_SEED, write_untrained_policy
from dpo.quickstart.generator import SUBSET_NAME, draw_rows, is_held_out, write_dataset

__all__ = [
    "DPO_SEED",
    "POLICY_FOLDER",
    "SAMPLE_PROMPTS",
    "SFT_ROWS",
    "SFT_SEED",
    "SUBSET_NAME",
    "TEST_ROWS",
    "TRAINED_RUN",
    "TRAIN_ROWS",
    "draw_rows",
    "is_held_out",
    "write_dataset",
    "write_untrained_policy",
]

POLICY_FOLDER: Path = Path(__file__).parent / "policy"
"""The shipped Hugging Face folder: `fresh` after a supervised stage on the chosen answers of another draw."""

TRAINED_RUN: Path = Path(__file__).parent / "trained"
"""The shipped run of a policy that began as `POLICY`: its export, and what it measured."""

DPO_SEED = 1
"""Seed of the draw that the default run trains and tests on; another one than `SFT_SEED`."""

SFT_ROWS = 30_000
"""Rows of the supervised stage."""

TRAIN_ROWS = 6_000
"""Rows of the default run's train part, of which its validation split is cut."""

TEST_ROWS = 400
"""Rows of the default run's test part."""

SAMPLE_PROMPTS: tuple[str, ...] = (
    "\n\nHuman: Which city is the capital of Japan?\n\nAssistant:",
    "\n\nHuman: What is the best way to make tea?\n\nAssistant:",
    "\n\nHuman: I am sad. What can I do?\n\nAssistant:",
)
"""Prompts with openings of the test part, for samples of the reference and the policy side by side."""

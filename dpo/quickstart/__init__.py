"""What `train.py fit` trains and trains on if nothing is named: a small world generated from seeds.

The package provides preference rows in hh-rlhf's format and a small policy that already answers. `topics` reads the
words, `generator` draws rows and `blank` makes an untrained policy.
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
"""The shipped Hugging Face folder: the untrained policy, trained on the chosen answers of `SFT_SEED`."""

TRAINED_RUN: Path = Path(__file__).parent / "trained"
"""The shipped run of a policy that started from `POLICY_FOLDER`: its export and its metrics."""

DPO_SEED = 1
"""Seed of the rows that the default run trains and tests on; not `SFT_SEED`, so that they are new to the policy."""

SFT_ROWS = 30_000
"""Number of rows of the supervised stage."""

TRAIN_ROWS = 6_000
"""Number of rows in the default run's train part, from which its validation split is taken."""

TEST_ROWS = 400
"""Number of rows in the default run's test part."""

SAMPLE_PROMPTS: tuple[str, ...] = (
    "\n\nHuman: Which city is the capital of Japan?\n\nAssistant:",
    "\n\nHuman: What is the best way to make tea?\n\nAssistant:",
    "\n\nHuman: I am sad. What can I do?\n\nAssistant:",
)
"""Prompts with openings of the test part, answered by reference and policy side by side."""

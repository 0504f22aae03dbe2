"""Training with TRL and with this project: the same model, pairs, order and optimizer give the same numbers.

This project runs on its command line and is read from metrics.csv; TRL runs in `tests/support/trl_side.py`. They share
only files. Thirteen numbers must agree at every step in float32, on dialogues that neither side cuts off; the measured
differences are at most a fifth of the tolerance. TRL silently ignores label smoothing, so that is not compared here.
"""

import math
from pathlib import Path

import pytest

from dpo import quickstart

pytest.importorskip("trl", reason="TRL is not installed (extra peers)")
from tests.support.trl import BATCH, STEPS, compare, fitting, random_model, real_rows
from tests.support.trl import _own_arguments as _own_arguments


def test_pretrained_policy_on_real_dialogues(pretrained: Path, hh_rlhf: Path, tmp_path: Path) -> None:
    rows = fitting(real_rows(hh_rlhf), pretrained, 100)
    steps = compare(tmp_path, pretrained, rows, "AdamW", 3e-4, val_fraction=0.15)
    assert steps[0]["loss"] == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("family", "optimizer", "rate"),
    [("llama", "AdamW", 1e-3), ("gpt_neox", "SGD", 0.1), ("qwen2", "AdamW", 1e-3), ("gpt2", "AdamW", 1e-3)],
)
def test_random_policies_on_real_dialogues(
    family: str, optimizer: str, rate: float, hh_rlhf: Path, tmp_path: Path
) -> None:
    policy = random_model(tmp_path / "policy", family)
    rows = fitting(real_rows(hh_rlhf), policy, STEPS * BATCH)
    compare(tmp_path, policy, rows, optimizer, rate)


def test_default_policy_on_generated_dialogues(tmp_path: Path) -> None:
    rows = fitting(quickstart.draw_rows(seed=3, n=150), quickstart.POLICY_FOLDER, 100)
    compare(tmp_path, quickstart.POLICY_FOLDER, rows, "AdamW", 3e-4, val_fraction=0.15)


def test_another_model_as_reference(tmp_path: Path) -> None:
    policy = random_model(tmp_path / "policy", "qwen2")
    reference = random_model(tmp_path / "reference", "llama", seed=1)
    rows = fitting(quickstart.draw_rows(seed=4, n=200), policy, STEPS * BATCH)
    steps = compare(tmp_path, policy, rows, "AdamW", 1e-3, reference=reference)
    assert abs(steps[0]["rewards/margins"]) > 0.1  # from the first step on: the reference is not the policy

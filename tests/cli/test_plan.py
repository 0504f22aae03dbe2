"""``python -m dpo plan``: what it prints, and what it refuses in one line."""

import subprocess
import sys

import pytest

from dpo.__main__ import main as dpo
from tests.support.data import cache as cache  # every test has an empty cache of its own


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--device", "h1000"], "--device: expected b200, h200, h100"),
        (["--devices", "0"], "--devices: expected a number above 0, got 0."),
        (["--model.policy", "no/such"], "--model.policy: expected a folder or hub id whose config.json can be read"),
        (["--devices", "64"], "--data.batch_size: expected at least one pair for each of 64 devices"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(
    options: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = dpo(["plan", *options])
    except SystemExit as end:
        code = end.code
    lines = [line for line in capsys.readouterr().err.splitlines() if expected in line]
    assert code == 1
    assert len(lines) == 1


@pytest.mark.slow
def test_a_plan_names_what_fits_and_the_command_line_for_it() -> None:
    """In a process of its own, as torch may not survive tensors without data."""
    command = [sys.executable, "-m", "dpo", "plan", "--device", "24", "--devices", "2", "--data.limit", "40"]
    done = subprocess.run([*command, "--flops-rate", "1e12"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    for expected in ("assumed, as the data are not tokenized yet", "ddp", "fsdp2", "offload", "LoRA", "Cached"):
        assert expected in done.stdout
    assert "python train.py fit --data.limit 40 --config configs/strategies/ddp.yaml" in done.stdout

"""A step without data needs the memory that a real one was measured to take."""

import json
import subprocess
import sys

import pytest

from tests.support.planning import MODELS, SETTINGS

TOLERANCE = 0.01  # relative; what is promised is 0.1


def _compare(cases: list[str]) -> dict[str, tuple[int, int]]:
    command = [sys.executable, "-m", "tests.support.planning", *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True))


def _wrong(peaks: dict[str, tuple[int, int]]) -> dict[str, float]:
    ratios = {case: planned / measured for case, (measured, planned) in peaks.items()}
    return {case: ratio for case, ratio in ratios.items() if abs(ratio - 1) > TOLERANCE}


def test_the_planned_peak_is_the_measured_one() -> None:
    assert not _wrong(_compare(["tied/checkpointing"]))


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_so_it_is_for_every_model_and_setting(model: str) -> None:
    peaks = _compare([f"{model}/{setting}" for setting in SETTINGS])
    assert not _wrong(peaks)
    assert len({measured for measured, _ in peaks.values()}) == len(SETTINGS), "every setting changes the peak"

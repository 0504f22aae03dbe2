"""`python -m dpo verify-resume`: stop and resume against no stop, on a user's own options."""

import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dpo.__main__ import main as dpo
from dpo.cli import verify_resume
from dpo.runs.equality import compare_values
from dpo.runs.folder import Run
from tests.support.data import cache as cache  # every test has an empty cache of its own
from tests.support.runs import Lab, checkpoint, metrics

RESTLESS = "tests.support.restless"


@pytest.fixture
def verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The verb on small data, whose fits run in this process; returns its exit code."""
    lab = Lab(tmp_path)

    def run_fit(words: Sequence[str]) -> tuple[int, str]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            return lab.only(*words), printed.getvalue()

    def run_verb(*more: str) -> int:
        words = [word for word in lab.words("verify-resume", *more) if "default_root_dir" not in word]
        try:
            return dpo(words)
        except SystemExit as end:
            return int(str(end.code))

    monkeypatch.setattr(verify_resume, "run_fit", run_fit)
    monkeypatch.setattr(verify_resume.signal, "signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["dpo"])
    return run_verb


def rows_of(printed: str) -> dict[str, list[str]]:
    """Cells of the table that was printed, by the first of their row."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line[:1] == "│"]
    return {first: rest for first, *rest in cells}


def test_what_is_stopped_and_resumed_equals_what_is_not(
    verify: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept"
    options = ["--steps=4", f"--to={kept}", "--trainer.accumulate_grad_batches=2", "--trainer.log_every_n_steps=3"]
    assert verify(*options) == 0
    printed = capsys.readouterr().out
    table = rows_of(printed)
    training = ("weights", "optimizer", "rest of the checkpoint", "rows of metrics.csv", "ledger")
    after = ("samples", "results.json", "export (SHA-256)")
    assert {part: tuple(cells[1:]) for part, cells in table.items()} == dict.fromkeys((*training, *after), ("0", "yes"))
    straight, resumed = Run(kept / "straight"), Run(kept / "resumed")
    assert int(table["weights"][0]) == len(checkpoint(straight)["state_dict"])
    assert checkpoint(resumed)["global_step"] == 4
    assert [row["step"] for row in metrics(straight) if "val/loss" in row] == [3, 4]
    assert "stopped after step 2 and before the validation after step 3" in printed
    assert not (kept / "straight-again").exists()


def test_a_state_that_no_checkpoint_holds_is_found(
    verify: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    callback = f"--trainer.callbacks={RESTLESS}.GrowingGradients"
    options = [f"--allow-import={RESTLESS}", callback, "--data.val_fraction=0", "--optimizer.lr=1e-3"]
    assert verify("--steps=3", *options) == 1
    printed = capsys.readouterr().out
    table = rows_of(printed)
    assert table["weights"][2] == table["optimizer"][2] == table["ledger"][2] == "no"
    assert float(table["weights"][1]) > 0
    assert "Different in weights: policy." in printed
    assert "so the stops are to blame" in printed
    assert not list(tmp_path.glob("verify-resume-*"))


def test_training_that_repeats_no_result_is_told_from_a_bad_resume() -> None:
    same = compare_values("weights", {"a": 1.0}, {"a": 1.0})
    other = compare_values("ledger", {"a": 1.0}, {"a": 2.0})
    assert "so the stops are to blame" in verify_resume.verdict_of_control([same])
    assert "Two runs without a stop differ as well (ledger)" in verify_resume.verdict_of_control([same, other])


def test_what_cannot_be_verified_is_said_in_a_line(
    verify: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert verify("--steps=2") == 1
    assert "--steps: expected at least 3 optimizer steps, got 2." in capsys.readouterr().err
    assert verify(f"--to={tmp_path}") == 1
    assert f"--to: expected a new folder, and {tmp_path} exists." in capsys.readouterr().err
    assert verify("--name=a", "--ckpt_path=last") == 1
    assert "leave out --name=a and --ckpt_path=last." in capsys.readouterr().err
    assert verify("--data.batch_size=0") == 1
    assert "--data.batch_size: expected at least 1 pair, got 0." in capsys.readouterr().err
    assert verify("--data.limit=1") == 1
    assert "ended with exit code 1:" in (error := capsys.readouterr().err)
    assert "pairs" in error.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_each_are_verified_by_the_real_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["dpo"])
    words = [word for word in Lab(tmp_path).words("verify-resume") if "default_root_dir" not in word]
    assert dpo([*words, "--steps=3", "--trainer.devices=2", f"--to={tmp_path / 'kept'}"]) == 0
    assert rows_of(capsys.readouterr().out)["ledger"][2] == "yes"

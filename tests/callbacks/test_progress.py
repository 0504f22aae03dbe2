"""The terminal: one progress line that never wraps, tables that fit, and what long work says."""

import re
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
from lightning.pytorch.callbacks import Timer
from rich.console import Console

from dpo.callbacks import slow_work
from dpo.callbacks.progress import join_what_fits, step_of_total, training_progress
from dpo.callbacks.samples import first_lines, last_turn_lines
from dpo.callbacks.slow_work import SlowWork
from tests.support.runs import ROOT, Lab
from tests.support.terminal import CONTROL, drawn_lines, printed_on_terminal

OPTIONS = ("--trainer.max_steps=6", "--trainer.val_check_interval=2", "--trainer.enable_progress_bar=true")


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_a_fit_fits_the_terminal(tmp_path: Path, columns: int) -> None:
    content = printed_on_terminal(columns, str(ROOT / "train.py"), *Lab(tmp_path).words("fit", "--name=one", *OPTIONS))
    lines = drawn_lines(content)
    shown = [
        line
        for line in lines
        if not line.startswith(
            ("Preflight:", "Checkpoints:", "Hugging Face", "Report:", "Run:", "Format:", "Reference:")
        )
    ]
    assert max(map(len, shown)) <= columns, "sentences and paths may be longer than a line"
    assert "\x1b[1A" not in content, "the cursor never goes up: nothing but the bar's own line is overwritten"
    (last,) = (index for index, line in enumerate(lines) if line.startswith("Trained "))
    assert len([line for line in lines[:last] if line.startswith("step 6/6")]) >= 1
    settled = re.sub(r"[^\n]*\r(?!\n)", "", CONTROL.sub("", content)).replace("\r", "")  # what stays on the screen
    assert [line[:8] for line in settled.splitlines() if line.startswith(("step ", "validation "))] == ["step 6/6"]
    assert settled.count("Held-out prompts after") == 3
    assert "Warning" not in settled


def test_a_file_gets_plain_lines(tmp_path: Path) -> None:
    process = Lab(tmp_path).start("fit", "--name=one", *OPTIONS)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert re.search(r"^step 2/6  loss ", printed, re.MULTILINE)
    table = printed[printed.index("Held-out prompts") :]
    assert not re.search("[\u2500-\u257f\x1b]", table), "neither frames of a terminal nor its colours"
    assert max(len(line) for line in table.splitlines() if line.startswith(("|", "+"))) <= 80


def trainer(step: int, total: float, timer: Timer | None = None) -> Any:
    made = Mock(spec=L.Trainer, global_step=step, estimated_stepping_batches=total)
    made.callbacks = [timer] if timer else []
    return made


def test_progress_counts_the_limit_that_is_reached_first(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer({"seconds": 100})
    monkeypatch.setattr(timer, "time_elapsed", lambda *_: 80.0)
    monkeypatch.setattr(time, "monotonic", lambda: 50.0)
    assert training_progress(trainer(10, 40), started_at=30.0, first_step=0) == (0.25, 30 * 2.0)
    assert training_progress(trainer(10, 40, timer), started_at=30.0, first_step=0) == pytest.approx((0.8, 20.0))
    assert training_progress(trainer(39, 40, timer), started_at=11.0, first_step=0) == pytest.approx((39 / 40, 1.0))
    assert training_progress(trainer(10, float("inf"), timer), started_at=30.0, first_step=0) == pytest.approx(
        (0.8, 20.0)
    )
    assert training_progress(trainer(3, 40), started_at=50.0, first_step=3) == (3 / 40, float("inf"))


def test_the_total_is_shown_where_there_is_one() -> None:
    assert step_of_total(trainer(3, 40)) == "step 3/40"
    assert step_of_total(trainer(3, float("inf"))) == "step 3"


@pytest.mark.parametrize(
    ("limits", "last"),
    [
        (["--trainer.max_steps=4"], "step 4/4"),
        (["--trainer.max_epochs=1"], "step 6/6"),
        (["--trainer.max_epochs=2", "--trainer.max_steps=4"], "step 4/4"),
        (["--trainer.max_epochs=1", "--trainer.max_steps=100"], "step 6/6"),
        (["--trainer.max_steps=4", "--trainer.max_time=00:01:00:00"], "step 4/4"),
    ],
)
def test_the_total_is_that_of_the_limit_reached_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], limits: list[str], last: str
) -> None:
    Lab(tmp_path).fit("one", "--data.val_fraction=0", "--trainer.enable_progress_bar=true", *limits)
    steps = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert steps[-1].startswith(f"{last}  loss ")


def test_a_run_that_only_time_limits_has_no_total(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limit = ["--data.val_fraction=0", "--trainer.enable_progress_bar=true", "--trainer.max_time=00:00:00:01"]
    Lab(tmp_path).fit("one", *limit)
    assert "\nstep 1  loss " in capsys.readouterr().out


def test_values_that_do_not_fit_are_left_out() -> None:
    items = ["0:01 left", "", "loss 0.5", "val 0.25"]
    assert join_what_fits(items, 9) == "0:01 left"
    assert join_what_fits(items, 19) == "0:01 left  loss 0.5"
    assert join_what_fits(items, 80) == "0:01 left  loss 0.5  val 0.25"
    assert join_what_fits(items, 5) == ""


def test_long_answers_and_prompts_are_cut_to_a_few_lines() -> None:
    console = Console(width=80)
    answer = first_lines("word " * 100, 20, console).plain.splitlines()
    assert len(answer) == 5 and answer[-1].endswith("...") and max(map(len, answer)) <= 20
    assert first_lines("short", 20, console).plain == "short"
    assert first_lines("a\x1b[2J\tb\nc", 20, console).plain == "a\ufffd[2J b\nc", "no answer controls the terminal"
    dialogue = "\n\nHuman: One?\n\nAssistant: Two.\n\nHuman: Three?\n\nAssistant:"
    assert last_turn_lines(dialogue, 20, console).plain == "... Three?"
    assert last_turn_lines("\n\nHuman: One?\n\nAssistant:", 20, console).plain == "One?"
    long_turn = last_turn_lines("\n\nHuman: " + "word " * 100 + "end?\n\nAssistant:", 20, console).plain.splitlines()
    assert len(long_turn) == 5 and long_turn[0] == "..." and long_turn[-1].endswith("end?")


def test_only_long_work_is_announced(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(slow_work, "PATIENCE", 0.1)
    work = SlowWork()
    work.begin("Quick")
    work.begin("Slow")
    time.sleep(0.4)
    work.begin("Ended")
    work.end()
    time.sleep(0.2)
    assert capsys.readouterr().out == "Slow ...\n"

"""What the commands draw on terminals of 80, 120 and 200 columns; the captures are left in the test's folder."""

import re
from pathlib import Path

import pytest

from tests.support.runs import ROOT, Lab
from tests.support.terminal import drawn_lines, printed_on_terminal

TRAIN = str(ROOT / "train.py")
FIT = ("--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.enable_progress_bar=true")
# Sentences and paths may be longer than a line; everything else, a table above all, may not.
SENTENCE = re.compile(
    r"(INFO: )?[A-Z][\w ]+(\([^)]*\))?: \S|error: |usage: |Tip: |--\w|Trained |Restor|Loaded |\w+/\w+:\d+ as "
)


@pytest.mark.parametrize(("verb", "title"), [("validate", "Validate metric"), ("test", "Test metric")])
def test_results_are_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, title: str) -> None:
    assert Lab(tmp_path).main(verb, "--name=one") == 0
    printed = capsys.readouterr().out
    assert "Results of the" in printed
    assert title not in printed, "the table of Lightning's own"


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 120, 200])
def test_what_is_drawn_fits_the_terminal(tmp_path: Path, columns: int) -> None:
    lab = Lab(tmp_path / "runs")
    lab.folder.mkdir()
    row = ("-m", "dpo", "show", *lab.words("", "--row=2")[1:])
    commands = {
        "fit": (0, TRAIN, *lab.words("fit", "--name=one", *FIT)),
        "validate": (0, TRAIN, *lab.words("validate", "--name=one", "--ckpt_path=last", FIT[2])),
        "test": (0, TRAIN, *lab.words("test", "--name=one", "--ckpt_path=last", FIT[2])),
        "show": (0, *row, "--split=val"),
        "compare": (0, "-m", "dpo", "compare", str(lab.folder / "one"), str(lab.folder / "one")),
        "refused-run": (1, TRAIN, *lab.words("fit", "--name=one", *FIT)),
        "refused-option": (2, TRAIN, *lab.words("fit", "--optimizer.lr=abc")),
    }
    too_wide = []
    for name, (code, *command) in commands.items():
        content = printed_on_terminal(columns, *command, exit_codes=[code])
        (tmp_path / f"{name}-{columns}.txt").write_text(content)
        lines = [line for line in drawn_lines(content) if not SENTENCE.match(line)]
        too_wide += [f"{name}: {line}" for line in lines if len(line) > columns]
        assert name not in ("validate", "test") or "\u2026" not in content, f"{name}: a cell was cut"
        assert "Traceback" not in content and "Warning" not in content, name
    assert too_wide == []

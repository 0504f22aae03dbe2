"""Data of one's own on the command line: the class chosen by the path, and a row shown as the model sees it."""

import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from dpo.__main__ import main as dpo
from dpo.cli.own_data import choose_data_class
from dpo.data.display import ExampleView
from tests.support.data import cache as cache  # every test has an empty cache of its own
from tests.support.runs import Lab, pairs, policy

PAIRS = ["--data", "PreferencePairs"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."} for i in range(10)]
    rows[2]["chosen"] = " "
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "my.jsonl"


def test_files_of_ones_own_are_preference_pairs(file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    option = f"--data.path={file}"
    assert choose_data_class(["fit", "--data.limit=3", option]) == ["fit", *PAIRS, "--data.limit=3", option]
    assert caplog.messages == [f"Data: PreferencePairs, as {file} is a file (--data names another class)."]
    for path in (str(tmp_path), "x/*.csv", "s3://a/b", "typo.jsonl"):
        assert choose_data_class(["fit", "--data.path", path]) == ["fit", *PAIRS, "--data.path", path]
    for path in (str(pairs()), "Anthropic/hh-rlhf", "quickstart"):
        assert choose_data_class(["fit", "--data.path", path]) == ["fit", "--data.path", path]


def test_a_class_that_is_named_stays(file: Path, tmp_path: Path) -> None:
    words = ["fit", "--data=Prompts", f"--data.path={file}"]
    assert choose_data_class(words) == words
    config = tmp_path / "a.yaml"
    config.write_text("data: {class_path: dpo.PreferencePairs}\n")
    words = ["fit", "--config", str(config), f"--data.path={file}"]
    assert choose_data_class(words) == words
    config.write_text("data: {class_path: dpo.HHRLHF, init_args: {batch_size: 2}}\n")
    assert choose_data_class(words) == [*words[:3], *PAIRS, words[3]]
    back = ["fit", words[3], *words[1:3]]
    assert choose_data_class(back) == ["fit", *PAIRS, words[3], *words[1:3], *PAIRS]


def test_what_cannot_be_told_is_asked_for_in_one_line(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name what it holds, .*--data Prompts.*--data PreferencePairs"):
        choose_data_class(["predict", f"--data.path={file}"])
    with pytest.raises(ValueError, match=rf"--data: expected a class .*--data.path {file}"):
        choose_data_class(["fit", "--data", str(file)])
    (tmp_path / "my.txt").write_text("secret\n" * 1000)
    with pytest.raises(ValueError, match=r"my.txt: expected a file that ends in .jsonl, .*csv") as error:
        choose_data_class(["fit", f"--data.path={tmp_path / 'my.txt'}"])
    assert "\n" not in str(error.value)


def test_the_content_of_a_file_never_takes_the_place_of_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = Lab(tmp_path / "runs")
    (tmp_path / "my.txt").write_text("secret\n" * 1000)
    assert lab.main("fit", "--data=PreferencePairs", f"--data.path={tmp_path / 'my.txt'}") == 1
    error = capsys.readouterr().err
    assert "secret" not in error
    assert f"--data.path {tmp_path / 'my.txt'}: expected files that end in .jsonl" in error


def test_a_run_on_a_csv_file_shows_an_example_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (tmp_path / "my.csv").write_text("prompt,chosen,rejected\n" + "".join(f"{i}?,yes,no\n" for i in range(8)))
    config = ["--trainer.max_steps=1", "--data.val_fraction=0"]
    Lab(tmp_path / "runs").fit("csv", f"--data.path={tmp_path / 'my.csv'}", *config)
    shown = [line.rstrip() for line in capfd.readouterr().out.splitlines()]
    start = next(number for number, line in enumerate(shown) if line.startswith("pairs/train:1 as hh, tokens:"))
    assert r"prompt    <s>\n\nHuman: 0?\n\nAssistant:" in shown[start:]
    assert "chosen    ▶ yes</s>" in shown[start:]
    assert "rejected  ▶ no</s>" in shown[start:]
    assert "Cut to 128 tokens: nothing." in shown[start : start + 15]
    assert "Format: hh, as the tokenizer has no chat template" in caplog.text


def test_show_prints_any_row_or_why_it_is_not_used(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["show", f"--data.path={file}", f"--model.policy={policy()}", "--data.format=plain"]
    assert dpo([*words, "--row", "2"]) == 0
    out = capfd.readouterr().out
    assert "pairs/train:2 as plain" in out
    assert "prompt    <s>What is 1?" in out
    assert "chosen    ▶It is 1.</s>" in out
    assert dpo([*words, "--row=3"]) == 0
    assert "pairs/train:3 is not used: empty answer." in capfd.readouterr().out
    with pytest.raises(SystemExit) as end:
        dpo([*words, "--row=11"])
    assert end.value.code == 1
    assert "--row: expected 1 to 10, the rows of train, got 11." in capfd.readouterr().err


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_long_example_takes_at_most_fifteen_lines(width: int) -> None:
    console = Console(width=width, record=True)
    long = "word " * 10_000
    console.print(ExampleView("pairs/train:1 " * 20, [(side, long) for side in ("prompt", "a", "b")], ["Cut."]))
    lines = console.export_text().splitlines()
    assert len(lines) <= 15
    assert all(len(line) <= width for line in lines)
    assert sum("characters ..." in line.replace("\n", "") for line in lines) <= 4


def test_a_held_out_row_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 24 training rows, 4 are held out: --split val counts through these."""
    words = ["show", f"--data.path={pairs()}", f"--model.policy={policy()}", "--split=val"]
    assert dpo(words) == 0
    first = capsys.readouterr().out
    assert dpo([*words, "--row=4"]) == 0
    last = capsys.readouterr().out
    names = [re.search(r"pairs/train:\d+ as hh", text).group() for text in (first, last)]
    assert names[0] != names[1]
    with pytest.raises(SystemExit, match="1"):
        dpo([*words, "--row=5"])
    assert "--row: expected 1 to 4, the rows of val, got 5." in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        dpo([*words, "--data.val_fraction=0"])
    assert "--split val: expected a split of" in capsys.readouterr().err

"""Every command that the README shows works: run in order, with small models and data instead of large ones."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from dpo import __main__ as verbs
from dpo.cli.main import main
from dpo.cli.parser import CONFIG_FOLDER
from tests.support.runs import ROOT, pairs, policy

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines()]
# Whatever a command names of these is replaced; a configuration's own steps and hub ids are too large for a test.
SMALL = {
    "--data.path": str(pairs()),
    "--data.subsets": "[pairs]",
    "--data.max_length": "128",
    "--data.batch_size": "4",
    "--data.val_fraction": "0.1",
    "--trainer.max_steps": "2",
    "--trainer.val_check_interval": "2",
    "--trainer.precision": "32-true",
    "--trainer.log_every_n_steps": "1",
    "--trainer.enable_progress_bar": "false",
}


def named(verb: str) -> list[list[str]]:
    return [command for command in COMMANDS if command[: len(verb.split())] == verb.split()]


def small(words: list[str], folder: Path) -> list[str]:
    """The words of a command behind `train.py`, with runs below `folder`."""
    moved = [str(folder / word.removeprefix("runs/")) if word.startswith("runs/") else word for word in words]
    own = "--model.policy" in moved and moved[moved.index("--model.policy") + 1].startswith(str(folder))
    model = {} if own else {"--model.policy": str(policy())}
    changed = {**SMALL, **model, "--trainer.default_root_dir": str(folder)}
    return moved + [word for option in changed.items() for word in option]


def test_the_commands_that_train_run_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = named("python train.py")
    assert len(commands) >= 6
    for _, _, *words in commands:
        with patch.object(sys, "argv", ["train.py"]):
            if any(word.endswith(".help") for word in words):
                capsys.readouterr()
                with pytest.raises(SystemExit) as end:
                    main(words)
                assert end.value.code == 0
                assert {"DPO": "--model.policy", "HHRLHF": "--data.path"}[words[-1]] in capsys.readouterr().out
            else:
                assert main(small(words, tmp_path)) == 0, words


def test_make_knows_its_targets() -> None:
    targets = {word for command in named("make") for word in command[1:2]}
    assert {"fit", "test"} <= targets
    for target in sorted(targets):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", named("python -m dpo"), ids=" ".join)
def test_verbs_take_what_the_readme_gives_them(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    verb, *words = command[3:]
    with pytest.raises(
        SystemExit
    ) as end:  # the verbs themselves are tested elsewhere; here: every option is one of theirs
        verbs.main([verb, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in words if word.startswith("--"))


def test_every_file_that_is_linked_is_there() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)


def test_every_configuration_that_is_listed_is_there() -> None:
    for name in re.findall(r"`([\w/]+\.yaml)`", README):
        assert (ROOT / "configs" / name).exists() or name == "config.yaml", name


TABLE = [shlex.split(command) for command in re.findall(r"`(python [^`]+)`", README)]


@pytest.mark.parametrize(
    "command", [c for c in TABLE if "train.py" in c[1] and "fit" in c and "--help" not in c], ids=" ".join
)
def test_training_commands_in_tables_are_understood(command: list[str], tmp_path: Path, capsys) -> None:
    words = [str(CONFIG_FOLDER / "hh_rlhf.yaml") if word.startswith("runs/") else word for word in command[2:]]
    words = [word for word in words if word not in ("--ckpt_path", "last", "auto")]  # there is no run to go on with
    with patch.object(sys, "argv", ["train.py"]), pytest.raises(SystemExit) as end:
        main([*words, "--print_config"])
    assert end.value.code == 0
    assert "class_path: dpo.DPO" in capsys.readouterr().out or "sft.yaml" in " ".join(command)


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    small = {
        '"Anthropic/hh-rlhf", subsets=["harmless-base"], batch_size=16': f'"{pairs()}", batch_size=4, max_length=128',
        '"HuggingFaceTB/SmolLM2-135M"': f'"{policy()}"',
        "max_steps=100": "max_steps=2, accelerator='cpu', logger=False",
    }
    for large, replacement in small.items():
        assert large in code
        code = code.replace(large, replacement)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "my-policy" / "adapter_config.json").is_file()

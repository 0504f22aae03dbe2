"""README and docs: every command and snippet runs, page by page in order, with small models and data for large ones."""

import ast
import gc
import inspect
import re
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import lightning as L
import pytest
import torch

import dpo
from dpo import __main__ as verbs
from dpo import losses
from dpo.callbacks.ledger import LedgerOptions
from dpo.cli.main import main
from dpo.cli.parser import CONFIG_FOLDER
from dpo.cli.serve import parse_options
from dpo.quickstart import TRAINED_RUN
from dpo.runs.folder import Run
from tests.support.runs import ROOT, pairs, policy

FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in FILES}
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\S*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
# Blocks that do not run here, by reason; a new one must be counted, and so must be meant.
NOT_RUN = {
    "needs CUDA": 1,
    "needs SLURM": 2,
    "needs an account of Weights & Biases": 1,
    "needs an account on the hub": 1,
    "needs several devices": 1,
    "needs several machines": 1,
    "needs the network": 3,
    "needs the rows and the model that these variables name": 1,
    "needs the server": 1,
    "serves until it is stopped": 2,
    "serves until it is stopped, and needs an account on the hub": 1,
    "tests/cli/test_sweeps.py runs it": 1,
    "tests/evaluation/test_evaluate.py measures such files": 1,
}
# What is too large for a test, in a command line that names a configuration or a model of the hub.
SMALL = {
    "--data.max_length": "128",
    "--trainer.max_steps": "2",
    "--trainer.val_check_interval": "2",
    "--trainer.precision": "32-true",
    "--trainer.log_every_n_steps": "1",
}
SMALL_DATA = {
    "--data.path": str(pairs()),
    "--data.subsets": "[pairs]",
    "--data.batch_size": "4",
    "--data.val_fraction": "0.1",
}
SMALL_PYTHON = {
    '"Anthropic/hh-rlhf", subsets=["harmless-base"], batch_size=16': f'"{pairs()}", batch_size=4, max_length=128',
    '"HuggingFaceTB/SmolLM2-135M"': f'"{policy()}"',
    "max_steps=100": "max_steps=2, accelerator='cpu', logger=False, enable_progress_bar=False",
}


@dataclass(frozen=True)
class Block:
    """A fenced block; `mark` is the comment before it: `not run: reason` or `file: name`."""

    mark: str
    language: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        lines = self.text.replace("\\\n", " ").splitlines() if self.language == "sh" else []
        words = [shlex.split(line, comments=True) for line in lines]
        return [command for line in words for command in split(line) if command]


def split(words: list[str]) -> list[list[str]]:
    if "&&" not in words:
        return [words]
    place = words.index("&&")
    return [words[:place], *split(words[place + 1 :])]


def blocks(page: str) -> list[Block]:
    return [Block(match["mark"] or "", match["language"], match["text"]) for match in FENCE.finditer(PAGES[page])]


def prose(page: str) -> str:
    return FENCE.sub("", PAGES[page])


def will_run(block: Block) -> bool:
    return block.language in ("sh", "python") and not block.mark.startswith("not run: ")


def small(words: list[str]) -> list[str]:
    """The words behind `train.py`, made small; those that name only what is small stay as they are."""
    named = dict(pairwise(words))
    model = named.get("--model.policy", "")
    options = {"--trainer.enable_progress_bar": "false"}
    if model and not Path(model).exists():
        options["--model.policy"] = str(policy())
    if any(word.startswith("configs/") for word in words) or options.keys() & {"--model.policy"}:
        options |= SMALL
        options |= {} if Path(named.get("--data.path", "none")).exists() else SMALL_DATA
        options |= {} if model else {"--model.policy": str(policy())}
    return words + [word for option in options.items() for word in option]


def train(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    shown = {"--model.help": "--model.policy", "--data.help": "--data.path", "--print_config": "class_path: dpo.DPO"}
    asked = [expected for option, expected in shown.items() if option in words]
    report = patch("dpo.cli.training_cli.report_line", return_value="Report: left out")  # pictures take seconds
    with patch.object(sys, "argv", ["train.py", *words]), report:
        if asked:
            capsys.readouterr()
            with pytest.raises(SystemExit) as end:
                main(words)
            assert end.value.code == 0
            assert asked[0] in capsys.readouterr().out
        else:
            assert main(small(words)) == 0, words


def run(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    match command:
        case ["python", "train.py", *words]:
            train(words, capsys)
        case ["python", "-m", "dpo", *words]:
            assert verbs.main(words) == 0, words
        case ["make", target, *_]:
            subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True)
        case ["mkdir" | "cp", *_]:
            subprocess.run(command, check=True)
        case _:
            pytest.fail(f"a test cannot run {shlex.join(command)}: mark the block <!-- not run: reason -->")


def run_block(block: Block, names: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    if block.mark.startswith("file: "):
        Path(block.mark.removeprefix("file: ")).write_text(block.text, encoding="utf-8")
    elif will_run(block) and block.language == "python":
        code = block.text
        for large, replacement in SMALL_PYTHON.items():
            code = code.replace(large, replacement)
        exec(compile(code, "snippet", "exec"), names)
    elif will_run(block):
        for command in block.commands:
            run(command, capsys)


@pytest.mark.parametrize("page", [page for page in PAGES if any(map(will_run, blocks(page)))])
def test_everything_on_a_page_runs_in_order(page: str, tmp_path: Path, monkeypatch, capsys) -> None:
    for package in ("peft", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("configs").symlink_to(CONFIG_FOLDER)
    names: dict[str, object] = {}
    for block in blocks(page):
        run_block(block, names, capsys)
    assert 'save_pretrained("my-policy")' not in PAGES[page] or Path("my-policy", "adapter_config.json").is_file()
    names.clear()
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)
    gc.collect()  # a page's own loss would otherwise stay among the subclasses that the command line lists


def test_the_readme_saves_a_policy_and_docs_train_measure_and_compare() -> None:
    """The test above runs what there is; this one says what there must be."""
    ran = [command for page in PAGES for block in blocks(page) if will_run(block) for command in block.commands]
    trained = [command for command in ran if command[:3] == ["python", "train.py", "fit"]]
    assert len(trained) >= 20
    used = {command[3] for command in ran if command[:3] == ["python", "-m", "dpo"]}
    assert used >= {"show", "report", "evaluate", "compare", "losses", "from-trl"}
    assert any("save_pretrained" in block.text for block in blocks("README.md") if will_run(block))


def test_blocks_that_do_not_run_are_counted_by_reason() -> None:
    marks = [block.mark for page in PAGES for block in blocks(page)]
    reasons = Counter(mark.removeprefix("not run: ") for mark in marks if mark.startswith("not run: "))
    assert reasons == NOT_RUN
    assert all(mark.startswith(("not run: ", "file: ")) for mark in marks if mark)


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_in_blocks_of_a_known_language(page: str) -> None:
    assert {block.language for block in blocks(page)} <= {"sh", "python", "text", "yaml", "{toctree}", "{eval-rst}"}
    assert not re.findall(r"^(?:    |```)\s*(?:python|make|torchrun|srun|wandb|dpo|pip) .*", prose(page), re.MULTILINE)


def understood_only() -> list[list[str]]:
    """Commands in tables and sentences, and those in blocks that do not run."""
    inline = [shlex.split(span) for page in PAGES for span in re.findall(r"`(python [^`]+)`", prose(page))]
    marked = [block for page in PAGES for block in blocks(page) if block.mark.startswith("not run: ")]
    commands = inline + [command for block in marked for command in block.commands]
    commands = [command for command in commands if "..." not in command and not re.search(r"\$[a-z]", str(command))]
    unique = {shlex.join(command): command for command in commands}
    return list(unique.values())


TRAINING = [c for c in understood_only() if c[:3] == ["python", "train.py", "fit"] and "--help" not in c]


@pytest.mark.parametrize("command", TRAINING, ids=" ".join)
def test_training_commands_that_do_not_run_are_understood(command: list[str], tmp_path: Path, capsys) -> None:
    replaced = {"$DPO_PRETRAINED": str(policy()), "$DPO_HH_RLHF": str(pairs()), "my.jsonl": str(tmp_path / "my.jsonl")}
    (tmp_path / "my.jsonl").write_text("{}\n")
    words = [replaced.get(word, word) for word in command[2:]]
    is_run = [word.startswith("runs/") and word.endswith(".yaml") for word in words]
    words = [str(CONFIG_FOLDER / "hh_rlhf.yaml") if run else word for run, word in zip(is_run, words, strict=True)]
    words = [word for word in words if word not in ("--ckpt_path", "last", "auto")]  # there is no run to go on with
    with patch.object(sys, "argv", ["train.py"]), pytest.raises(SystemExit) as end:
        main([*words, "--print_config"])
    assert end.value.code == 0
    assert "class_path: dpo.DPO" in capsys.readouterr().out or "sft.yaml" in " ".join(command)


VERBS_WITH_FIT_OPTIONS = {"show", "plan", "verify-resume", "doctor"}


@pytest.mark.parametrize(
    "command", [c for c in understood_only() if c[:3] == ["python", "-m", "dpo"] and len(c) > 3], ids=" ".join
)
def test_verbs_know_the_options_that_pages_give_them(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    verb, *words = command[3:]
    try:
        verbs.main([verb, "--help"])
    except SystemExit as end:
        assert end.code == 0
    shown = capsys.readouterr().out
    # --data.path and so on are options of fit
    own = [word for word in words if word.startswith("--") and "." not in word]
    assert all(
        re.search(rf"{word}\b", shown) for word in own if verb not in VERBS_WITH_FIT_OPTIONS or word != "--config"
    )


def test_the_server_knows_its_options() -> None:
    commands = [c for c in understood_only() if c[:2] == ["python", "serve.py"]]
    assert len(commands) >= 3
    for command in commands:
        parse_options(command[2:])


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.is_file(), link
        headings = re.findall(r"^#+ (.*)$", FENCE.sub("", target.read_text("utf-8")), re.MULTILINE) if anchor else []
        assert not anchor or anchor in map(slug, headings), link


@pytest.mark.parametrize("page", PAGES)
def test_configurations_that_are_named_are_there(page: str) -> None:
    own = {block.mark.removeprefix("file: ") for block in blocks(page)} | {"config.yaml", "mine.yaml", "theirs.yaml"}
    for name in re.findall(r"`(?:configs/)?([\w/]+\.yaml)`", prose(page)):
        assert (CONFIG_FOLDER / name).exists() or name in own, name


@pytest.mark.parametrize("page", PAGES)
def test_options_that_are_named_exist(page: str) -> None:
    classes = [getattr(dpo, name) for name in dpo.__all__ if name != "losses"]
    classes += [getattr(losses, name) for name in losses.__all__] + [L.Trainer, LedgerOptions, torch.optim.AdamW]
    known = {name for each in classes for name in inspect.signature(each).parameters} | {"help", "init_args"}
    known |= {"loss", "optimizer", "lr_scheduler", "NAME"}  # the last stands for any
    options = {
        each for each in re.findall(r"--((?:model|data|trainer|optimizer|ledger)[\w.]+)", prose(page)) if "." in each
    }
    assert {option for option in options if not set(option.rstrip(".").split(".")[1:]) <= known} == set()


def test_the_api_page_has_every_public_name() -> None:
    documented = set(re.findall(r"^\.\. auto(?:class|module):: dpo\.(\S+)$", PAGES["docs/api.md"], re.MULTILINE))
    assert documented == {*dpo.__all__, *(f"losses.{name}" for name in losses.__all__)}


def table_rows(page: str) -> set[tuple[str, ...]]:
    rows = re.findall(r"^\| (.*) \|$", PAGES[page], re.MULTILINE)
    return {tuple(cell.replace("\\|", "|") for cell in re.split(r"(?<!\\) \| ", row)) for row in rows}


@pytest.mark.skipif(not find_spec("matplotlib"), reason="needs the extra report")
def test_the_page_on_reports_says_what_reports_say(tmp_path: Path) -> None:
    from dpo.reports import verdicts
    from dpo.reports.contents import read_contents
    from dpo.reports.findings import find_out
    from dpo.reports.gallery import draw_gallery

    rows = table_rows("docs/report.md")
    thresholds = {(f"`{name}`", f"{each.value:g}", each.reason) for name, each in verdicts.THRESHOLDS.items()}
    assert thresholds <= rows
    findings = find_out(read_contents(Run(TRAINED_RUN)))
    pictures = {(picture.question, picture.reading) for picture in draw_gallery(findings, tmp_path)}
    assert len(pictures) == 12 and pictures <= rows
    subjects = [verdict.subject for verdict in verdicts.judge_run(findings)]
    order = re.findall(r"^\| ([A-Z][\w -]+) \| .* \|$", PAGES["docs/report.md"], re.MULTILINE)
    assert order[: len(subjects)] == subjects
    source = ast.parse(Path(verdicts.__file__).read_text(encoding="utf-8"))
    texts = " ".join(n.value for n in ast.walk(source) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    remedies = set(re.findall(r"--(?:config configs/)?[\w./]+", texts))
    assert len(remedies) >= 10
    assert remedies <= set(re.findall(r"--(?:config configs/)?[\w./]+", prose("docs/report.md")))


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_parser", "furo", "peft"):
        pytest.importorskip(package)
    words = [
        "--fail-on-warning",
        "--keep-going",
        "--quiet",
        "-d",
        str(tmp_path / "trees"),
        "docs",
        str(tmp_path / "site"),
    ]
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site" / "tutorial.html").is_file()

"""The model card of an export: its metadata, a program that runs, and nothing that only this machine has."""

import contextlib
import io
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from dpo.models.loading import ModelLoader
from dpo.models.origin import PolicyOrigin
from dpo.runs.card import TrainingFacts, hardware_in_words, model_card
from dpo.runs.export import export_run
from dpo.runs.folder import Run
from dpo.runs.intervals import mean_interval
from dpo.runs.loggers import MetricsCSV
from tests.support.runs import Lab, policy

CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("runs"))


def export_card(run: Run) -> ModelCard:
    return ModelCard.load(run.export_folder / "README.md")


def asked_program(card: str) -> str:
    found = re.search(r"```python\n(# pip install .*?)```", card, re.DOTALL)
    assert found
    return found.group(1)


OPTIONS = {
    "dpo": (["--model.policy=quickstart"], "transformers", "dpo"),
    "sft": (["--model.policy=quickstart", "--model=SFT"], "transformers", "sft"),
    "lora": (["--model.policy=quickstart", "--model.adapter=LoRA"], "peft", "dpo"),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_card_of_a_run_is_complete_and_its_program_runs(
    lab: Lab, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, library, tag = OPTIONS[kind]
    run = lab.fit(kind, *options, "--trainer.max_steps=2", "--trainer.val_check_interval=2")
    card = export_card(run)
    assert (card.data.library_name, card.data.tags) == (library, [tag])
    assert re.search(r"in 2 optimizer steps, which took (less than 2|about \d+) seconds, from", card.text)
    assert "from a training split of 20 preference pairs, on 1 x CPU process." in card.text
    assert repr("\n\nHuman: How do I make tea?\n\nAssistant:") in card.text
    assert str(lab.folder) not in card.text and str(Path.home()) not in card.text
    monkeypatch.chdir(run.export_folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(asked_program(card.text), "card", "exec"), {})
    assert printed.getvalue().strip()


@pytest.mark.parametrize(("text_format", "takes_messages"), [("chat", True), ("hh", False), ("plain", False)])
def test_the_program_of_a_model_with_a_template_of_its_own_runs(
    text_format: str, takes_messages: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(policy())
    model, tokenizer = ModelLoader().load_model(path), ModelLoader().load_tokenizer(path)
    tokenizer.chat_template = CHAT
    run = minimal_run(tmp_path)
    export_run(run, model, tokenizer, PolicyOrigin(path, path, format=text_format), data="x", card_summary="trained")
    text = export_card(run).text
    assert ("'role': 'user'" in text) == takes_messages
    assert {"chat": "'[user]How do", "hh": r"'\n\nHuman: How do", "plain": "'How do"}[text_format] in text
    monkeypatch.chdir(run.export_folder)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(asked_program(text), "card", "exec"), {})


def minimal_run(folder: Path) -> Run:
    run = Run(folder)
    folder.mkdir(exist_ok=True)
    run.config_path.write_text("name: minimal\n")
    MetricsCSV(run.metrics_path).log_metrics({"train/loss": 0.5}, step=1)
    return run


def folder_of(path: Path, origin: PolicyOrigin | None = None, **metadata: Any) -> str:
    """Make a policy folder with an origin, or with a model card with these metadata."""
    path.mkdir(parents=True)
    if origin:
        (path / "origin.json").write_text(json.dumps(asdict(origin)))
        (path / "train_config.yaml").touch()
    if metadata:
        (path / "README.md").write_text(f"---\n{json.dumps(metadata)}\n---\ntext")
    return str(path)


def test_the_base_after_two_stages_is_the_model_of_the_hub(tmp_path: Path) -> None:
    sft = folder_of(tmp_path / "sft" / "export", PolicyOrigin("org/base", "org/base"))
    card = model_card(minimal_run(tmp_path / "run"), sft, "org/pairs, /home/me/own.jsonl", "trained")
    assert (card.data.base_model, card.data.datasets) == ("org/base", ["org/pairs"])
    assert "`sft` (which began as `org/base`) trained, on org/pairs, own.jsonl, by" in card.text
    assert str(tmp_path) not in str(card)


def test_the_licence_and_base_of_a_copy_come_from_its_card(tmp_path: Path) -> None:
    copy = folder_of(tmp_path / "copy", license="other", license_name="own", base_model=["org/base"])
    card = model_card(minimal_run(tmp_path / "run"), copy, "x", "trained", TrainingFacts(license="mit"))
    assert (card.data.license, card.data.license_name, card.data.base_model) == ("other", "own", "org/base")
    unknown = folder_of(tmp_path / "unknown")
    card = model_card(minimal_run(tmp_path / "run"), unknown, "x", "trained", TrainingFacts(license="mit"))
    assert (card.data.license, card.data.base_model, card.data.datasets) == ("mit", None, None)
    assert "language" not in card.data.to_dict()


def test_a_folder_that_names_itself_as_its_base_ends_the_search(tmp_path: Path) -> None:
    path = str(tmp_path / "circle")
    folder_of(Path(path), PolicyOrigin(path, path))
    assert model_card(minimal_run(tmp_path / "run"), path, "x", "trained").data.base_model is None


def test_the_time_covers_steps_whose_speed_was_not_logged(tmp_path: Path) -> None:
    run = Run(tmp_path)
    log = MetricsCSV(run.metrics_path)
    log.log_metrics({"train/time/step": 1.0}, step=10)
    log.log_metrics({"train/time/step": 3.0}, step=20)
    log.log_metrics({"train/loss": 0.5}, step=150)
    text = model_card(run, "org/base", "x", "trained").text
    assert "in 150 optimizer steps, which took about 5 minutes." in text, "2 seconds a step"


def test_hardware_is_named_without_the_machine() -> None:
    assert hardware_in_words(torch.device("cpu"), 2) == "2 x CPU process"


def counts(**changes: Any) -> dict[str, Any]:
    """The counts of a split, as audit.json has them."""
    total = {"read": 12, "kept": 12, "refused": {}, "bad": {}, "cut": {}, "longer_wins": 0.5}
    return {"total": total | changes}


def test_accuracies_have_intervals_and_are_in_the_metadata(tmp_path: Path) -> None:
    run = minimal_run(tmp_path / "run")
    run.update_results({"val/rewards/accuracies": 0.75, "test/rewards/accuracies": 0.625, "val/loss": 0.6})
    run.audit_path.write_text(json.dumps({"test": counts(kept=8, longer_wins=0.25)}))
    facts = TrainingFacts(validation_pairs=4, data_sha256="ab" * 32)
    card = model_card(run, "org/base", "org/pairs", "trained", facts)
    low, high = (100 * end for end in mean_interval([1, 1, 1, 0]))
    assert f"| reward accuracy, validation | 75.0 | {low:.1f}-{high:.1f} | - | - | 4 | {'ab' * 8} |" in card.text
    low, high = (100 * end for end in mean_interval([1, 1, 1, 1, 1, 0, 0, 0]))
    assert f"| reward accuracy, test | 62.5 | {low:.1f}-{high:.1f} | - | 25.0 | 8 | {'ab' * 8} |" in card.text
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "run"
    assert [(each.dataset_type, each.dataset_split, each.metric_type, each.metric_value) for each in results] == [
        ("org/pairs", "validation", "accuracy", 0.75),
        ("org/pairs", "test", "accuracy", 0.625),
    ]
    assert results == ModelCard(str(card)).data.eval_results


def test_lost_and_cut_rows_are_in_the_card(tmp_path: Path) -> None:
    run = minimal_run(tmp_path / "run")
    refused = {"empty_answer": 2, "identical_answers": 0}
    train = counts(read=12, kept=9, refused=refused, bad={"cut_line": 1}, cut={"prompt_cut": 0.25, "chosen_cut": 0.0})
    run.audit_path.write_text(json.dumps({"train": train}))
    text = model_card(run, "org/base", "x", "trained").text
    assert "| train | 12 | 9 | 2 | 1 | 50.0 |" in text
    assert "Not used: 2 of train empty answer; 1 of train cut line." in text
    assert "- Pairs of train were cut to the maximum length: prompt cut in 25.0 %.\n" in text
    assert "reward accuracy" not in text, "nothing was measured"


def test_the_licences_of_base_and_data_are_named(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", license=["mit", "odc-by"])
    (tmp_path / "data" / "pairs.jsonl").touch()
    facts = TrainingFacts(license="apache-2.0")
    text = model_card(minimal_run(tmp_path / "run"), "org/base", f"{data}/pairs.jsonl, x", "trained", facts).text
    expected = "- Base model: apache-2.0\n- Data pairs.jsonl: mit, odc-by\n- Data x: unknown, ask its source\n"
    assert expected in text

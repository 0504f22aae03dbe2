"""The folder at the end of a run: anything can load it, it speaks and stops, and its card says what was measured."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo import quickstart
from dpo.export import card, export
from dpo.loggers import MetricsCSV
from dpo.models import Loader
from dpo.run import Run
from tests.runs import Lab, policy, weights


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two steps of the shipped policy, which has learned to speak and to stop."""
    words = ["--model.policy=quickstart", "--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    return Lab(tmp_path_factory.mktemp("runs")).fit("one", *words, "--optimizer.lr=1e-4")


def test_it_is_the_trained_policy_to_the_bit(run: Run) -> None:
    exported = AutoModelForCausalLM.from_pretrained(run.export).state_dict()
    trained = {name.removeprefix("policy."): value for name, value in weights(run).items()}
    assert all(torch.equal(exported[name], value) for name, value in trained.items())
    before = AutoModelForCausalLM.from_pretrained(quickstart.POLICY).state_dict()
    assert not all(torch.equal(before[name], value) for name, value in trained.items())


def test_it_generates_and_stops_at_the_end_of_sequence(run: Run) -> None:
    model, words = AutoModelForCausalLM.from_pretrained(run.export), AutoTokenizer.from_pretrained(run.export)
    for prompt in quickstart.SAMPLE_PROMPTS:
        ids = words(prompt, return_tensors="pt")
        output = model.generate(**ids, max_new_tokens=200, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert 1 < len(output) < 200
        assert output[-1] == words.eos_token_id
        assert words.decode(output, skip_special_tokens=True).strip()


def test_its_configuration_is_an_ordinary_one(run: Run) -> None:
    config = json.loads((run.export / "config.json").read_text())
    original = json.loads((quickstart.POLICY / "config.json").read_text())
    assert config["architectures"] == original["architectures"]
    assert "prefix_shared" not in (run.export / "config.json").read_text()
    assert (run.export / "train_config.yaml").read_bytes() == run.config.read_bytes()
    assert yaml.safe_load(run.config.read_text())["name"] == "one"


def test_its_card_says_what_was_measured(run: Run) -> None:
    text = (run.export / "README.md").read_text()
    for name, value in json.loads(run.results.read_text()).items():
        assert f"| {name} | {value:.4f} |" in text
    assert (run.folder / "results.md").read_text() in text
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.tags) == ("transformers", "text-generation", ["dpo"])
    assert data.base_model is None, "a folder of this machine is no name that others know"
    assert str(Path.home()) not in text


def test_its_files_can_be_read_by_everybody(run: Run) -> None:
    assert {file.stat().st_mode & 0o777 for file in run.export.iterdir()} == {0o644}
    assert not list(run.folder.glob(".*"))


def exported(folder: Path) -> Run:
    """The least that a run has when it is exported."""
    run = Run(folder)
    run.config.write_text("name: least\n")
    MetricsCSV(run.metrics).log_metrics({"train/loss": 0.5}, step=1)
    return run


def test_the_card_names_a_model_of_the_hub(tmp_path: Path) -> None:
    text = card(exported(tmp_path), "someone/model", "someone/data", "trained on preferences")
    assert text.data.base_model == "someone/model"
    assert "`someone/model` trained on preferences, on data," in text.text
    assert "| none | |" in text.text, "nothing was validated"


def test_a_kill_while_exporting_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, loader = exported(tmp_path), Loader()
    model, words = loader.model(str(policy())), loader.tokenizer(str(policy()))
    export(run, model, words, base=str(policy()), data="x", story="trained")
    before = {file.name: file.read_bytes() for file in run.export.iterdir()}

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(words), "save_pretrained", killed)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    with pytest.raises(KeyboardInterrupt):
        export(run, model, words, base=str(policy()), data="x", story="trained")
    assert {file.name: file.read_bytes() for file in run.export.iterdir()} == before
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]

"""The export of a run: it loads in transformers and generates, its card reports the results, its origin is recorded."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo import quickstart
from dpo.losses import DPO, IPO, LD, NLL, WPO, PairLogps, PreferenceLoss, SimPO, Sum
from dpo.models.loading import ModelLoader
from dpo.models.origin import PolicyOrigin, find_policy, save_policy
from dpo.models.reference import AdapterOff, Copy, Model, Moving, Nothing, Reference
from dpo.runs.card import model_card
from dpo.runs.export import export_run
from dpo.runs.folder import Run, run_of_export
from dpo.runs.loggers import MetricsCSV
from dpo.runs.results import result_values
from dpo.training.precomputed import Cached
from tests.support.runs import Lab, policy, weights


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two steps from the shipped policy, whose answers are sentences that end."""
    options = ["--model.policy=quickstart", "--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    return Lab(tmp_path_factory.mktemp("runs")).fit("one", *options, "--optimizer.lr=1e-4")


def test_the_export_equals_the_trained_policy_to_the_bit(run: Run) -> None:
    exported = AutoModelForCausalLM.from_pretrained(run.export_folder).state_dict()
    trained = {name.removeprefix("policy."): value for name, value in weights(run).items()}
    assert all(torch.equal(exported[name], value) for name, value in trained.items())
    before = AutoModelForCausalLM.from_pretrained(quickstart.POLICY_FOLDER).state_dict()
    assert not all(torch.equal(before[name], value) for name, value in trained.items())


def test_the_export_generates_and_stops_at_the_end_of_sequence(run: Run) -> None:
    model = AutoModelForCausalLM.from_pretrained(run.export_folder)
    tokenizer = AutoTokenizer.from_pretrained(run.export_folder)
    for prompt in quickstart.SAMPLE_PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**ids, max_new_tokens=200, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert 1 < len(output) < 200
        assert output[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(output, skip_special_tokens=True).strip()


def test_the_model_configuration_names_no_class_of_this_package(run: Run) -> None:
    config = json.loads((run.export_folder / "config.json").read_text())
    original = json.loads((quickstart.POLICY_FOLDER / "config.json").read_text())
    assert config["architectures"] == original["architectures"]
    assert "prefix_shared" not in (run.export_folder / "config.json").read_text()
    assert (run.export_folder / "train_config.yaml").read_bytes() == run.config_path.read_bytes()
    assert yaml.safe_load(run.config_path.read_text())["name"] == "one"


def test_the_model_card_reports_the_results(run: Run) -> None:
    text = (run.export_folder / "README.md").read_text()
    for name, value in result_values(run).items():
        assert f"| {name} | {value:.4f} |" in text
    assert (run.folder / "results.md").read_text() in text
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.tags) == ("transformers", "text-generation", ["dpo"])
    assert data.base_model is None, "others do not have a local folder"
    assert str(Path.home()) not in text


def test_the_exported_files_are_readable_by_everybody(run: Run) -> None:
    assert {file.stat().st_mode & 0o777 for file in run.export_folder.iterdir()} == {0o644}
    assert not list(run.folder.glob(".*"))


def minimal_run(folder: Path) -> Run:
    """A run with the least that an export needs."""
    run = Run(folder)
    run.config_path.write_text("name: minimal\n")
    MetricsCSV(run.metrics_path).log_metrics({"train/loss": 0.5}, step=1)
    return run


def test_the_model_card_names_a_base_model_of_the_hub(tmp_path: Path) -> None:
    card = model_card(minimal_run(tmp_path), "someone/model", "someone/data", "trained on preferences")
    assert (card.data.base_model, card.data.datasets) == ("someone/model", ["someone/data"])
    assert "`someone/model` trained on preferences, on someone/data," in card.text
    assert "| none | |" in card.text, "nothing was validated"


def test_a_kill_while_exporting_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, path = minimal_run(tmp_path), str(policy())
    model, tokenizer = ModelLoader().load_model(path), ModelLoader().load_tokenizer(path)
    export_run(run, model, tokenizer, PolicyOrigin(path, path), data="x", card_summary="trained")
    before = {file.name: file.read_bytes() for file in run.export_folder.iterdir()}

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tokenizer), "save_pretrained", killed)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    with pytest.raises(KeyboardInterrupt):
        export_run(run, model, tokenizer, PolicyOrigin(path, path), data="x", card_summary="trained")
    assert {file.name: file.read_bytes() for file in run.export_folder.iterdir()} == before
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_bfloat16_base_is_exported_in_bfloat16_and_the_card_says_so(run: Run, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(quickstart.POLICY_FOLDER)
    base = tmp_path / "base"
    ModelLoader().load_model("quickstart").to(torch.bfloat16).save_pretrained(base)
    tokenizer.save_pretrained(base)
    lab = Lab(tmp_path)
    for name, found, options in (
        ("auto", "bfloat16", []),
        ("full", "float32", ["--model.adapter.export_dtype=float32"]),
    ):
        exported = lab.fit(name, f"--model.policy={base}", "--trainer.max_steps=1", *options)
        assert json.loads((exported.export_folder / "config.json").read_text())["dtype"] == found
        assert {p.dtype for p in weights(exported).values()} == {torch.float32}, "checkpoints keep all digits"
        assert f"The weights, the full model, are in {found}" in (exported.export_folder / "README.md").read_text()


def test_generation_ends_at_the_end_of_sequence_of_the_tokenizer_too(tmp_path: Path) -> None:
    path = str(policy())
    model, tokenizer = ModelLoader().load_model(path), ModelLoader().load_tokenizer(path)
    for known, expected in ((None, [2]), (5, [2, 5]), ([5, 6], [2, 5, 6]), ([5, 2], [5, 2]), (2, 2)):
        model.generation_config.eos_token_id = known
        folder = tmp_path / str(known)
        save_policy(folder, model, tokenizer, PolicyOrigin(path, path))
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == expected


def write_origin(folder: Path, origin: PolicyOrigin) -> str:
    """Write the origin of a policy into its folder, and return the folder."""
    (folder / "origin.json").write_text(json.dumps(asdict(origin)))
    return str(folder)


REFERENCES = {
    Copy(): "some/base",
    Moving(): "some/base",
    Nothing(): "some/base",
    Model("b/c"): "b/c",
    Cached(of=Model("b/c")): "b/c",
    Cached(): "some/base",
}


@pytest.mark.parametrize("reference", REFERENCES, ids=repr)
def test_a_reference_names_the_model_that_the_policy_is_compared_with(reference: Reference) -> None:
    assert reference.compared_path("some/base") == REFERENCES[reference]


def test_adapter_off_compares_with_the_base_model_of_the_adapter(tmp_path: Path) -> None:
    assert AdapterOff().compared_path("quickstart") == "quickstart"  # a new adapter, on the policy itself
    config = {"peft_type": "LORA", "base_model_name_or_path": "the/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert AdapterOff().compared_path(str(tmp_path)) == "the/base"
    assert Copy().compared_path(str(tmp_path)) == str(tmp_path)


def test_the_origin_names_what_the_policy_was_trained_against(tmp_path: Path) -> None:
    folder = write_origin(tmp_path, PolicyOrigin("some/base", "b/c", beta=0.3, format="hh"))
    found = find_policy(folder)
    assert (found.policy_path, found.reference_path, found.beta, found.format) == (folder, "b/c", 0.3, "hh")
    named = find_policy(folder, "other/base")
    assert (named.reference_path, named.beta, named.format) == ("other/base", 0.3, "hh")
    assert find_policy(write_origin(tmp_path, PolicyOrigin("a", "quickstart"))).reference_path.endswith("policy")
    with pytest.raises(ValueError, match=r"last.ckpt, which holds it, is gone"):
        find_policy(write_origin(tmp_path, PolicyOrigin("a", "a", moving=True)))
    (tmp_path / "origin.json").write_text('{"base": "a"')
    with pytest.raises(ValueError, match=r"origin\.json cannot be read"):
        find_policy(str(tmp_path))


@pytest.mark.parametrize(
    "loss",
    [
        DPO(beta=0.3),
        LD(DPO(beta=0.3)),
        WPO(LD(IPO(beta=0.3))),
        Sum((DPO(beta=0.3), DPO(beta=0.7)), (1.0, 1.0)),
        Sum((NLL(), SimPO(beta=2.0), LD(DPO(beta=0.3))), (1.0, 1.0, 1.0)),
    ],
)
def test_the_reward_scale_is_the_beta_of_the_rewards(loss: PreferenceLoss) -> None:
    logps = PairLogps(torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -2.0]), torch.zeros(2), (1, 1))
    assert loss.rewards(logps)[0, 0].item() == pytest.approx(0.3)  # of a log-ratio of 1
    assert loss.reward_scale == 0.3


def test_the_origin_of_a_policy_without_a_reference_names_a_substitute(tmp_path: Path) -> None:
    folder = write_origin(tmp_path, PolicyOrigin("the/start", "the/start", has_reference=False))
    found, named = find_policy(folder), find_policy(folder, "another/model")
    assert (found.reference_path, found.has_reference) == ("the/start", False)
    assert "trained without a reference" in found.reference_note
    assert (named.reference_path, named.has_reference, named.reference_note) == ("another/model", True, "")


def test_without_an_origin_the_reference_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--reference"):
        find_policy(str(tmp_path))
    found = find_policy(str(tmp_path), "a/b")
    assert (found.reference_path, found.beta, found.format) == ("a/b", 0.1, "auto")
    assert run_of_export(str(tmp_path)).folder == tmp_path

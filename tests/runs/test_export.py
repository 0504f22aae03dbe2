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
from dpo.losses import DPO, IPO, LD, NLL, WPO, PairLogps, PreferenceLoss, SimPO, Sum
from dpo.models.loading import ModelLoader
from dpo.runs.export import export_run, model_card, read_origin
from dpo.runs.folder import Run
from dpo.runs.loggers import MetricsCSV
from tests.support.runs import Lab, policy, weights


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two steps of the shipped policy, which has learned to speak and to stop."""
    words = ["--model.policy=quickstart", "--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    return Lab(tmp_path_factory.mktemp("runs")).fit("one", *words, "--optimizer.lr=1e-4")


def test_it_is_the_trained_policy_to_the_bit(run: Run) -> None:
    exported = AutoModelForCausalLM.from_pretrained(run.export_folder).state_dict()
    trained = {name.removeprefix("policy."): value for name, value in weights(run).items()}
    assert all(torch.equal(exported[name], value) for name, value in trained.items())
    before = AutoModelForCausalLM.from_pretrained(quickstart.POLICY_FOLDER).state_dict()
    assert not all(torch.equal(before[name], value) for name, value in trained.items())


def test_it_generates_and_stops_at_the_end_of_sequence(run: Run) -> None:
    model, words = (
        AutoModelForCausalLM.from_pretrained(run.export_folder),
        AutoTokenizer.from_pretrained(run.export_folder),
    )
    for prompt in quickstart.SAMPLE_PROMPTS:
        ids = words(prompt, return_tensors="pt")
        output = model.generate(**ids, max_new_tokens=200, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert 1 < len(output) < 200
        assert output[-1] == words.eos_token_id
        assert words.decode(output, skip_special_tokens=True).strip()


def test_its_configuration_is_an_ordinary_one(run: Run) -> None:
    config = json.loads((run.export_folder / "config.json").read_text())
    original = json.loads((quickstart.POLICY_FOLDER / "config.json").read_text())
    assert config["architectures"] == original["architectures"]
    assert "prefix_shared" not in (run.export_folder / "config.json").read_text()
    assert (run.export_folder / "train_config.yaml").read_bytes() == run.config_path.read_bytes()
    assert yaml.safe_load(run.config_path.read_text())["name"] == "one"


def test_its_card_says_what_was_measured(run: Run) -> None:
    text = (run.export_folder / "README.md").read_text()
    for name, value in json.loads(run.results_path.read_text()).items():
        assert f"| {name} | {value:.4f} |" in text
    assert (run.folder / "results.md").read_text() in text
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.tags) == ("transformers", "text-generation", ["dpo"])
    assert data.base_model is None, "a folder of this machine is no name that others know"
    assert str(Path.home()) not in text


def test_its_files_can_be_read_by_everybody(run: Run) -> None:
    assert {file.stat().st_mode & 0o777 for file in run.export_folder.iterdir()} == {0o644}
    assert not list(run.folder.glob(".*"))


def exported(folder: Path) -> Run:
    """The least that a run has when it is exported."""
    run = Run(folder)
    run.config_path.write_text("name: least\n")
    MetricsCSV(run.metrics_path).log_metrics({"train/loss": 0.5}, step=1)
    return run


def test_the_card_names_a_model_of_the_hub(tmp_path: Path) -> None:
    text = model_card(exported(tmp_path), "someone/model", "someone/data", "trained on preferences")
    assert text.data.base_model == "someone/model"
    assert "`someone/model` trained on preferences, on data," in text.text
    assert "| none | |" in text.text, "nothing was validated"


def test_a_kill_while_exporting_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, loader = exported(tmp_path), ModelLoader()
    model, words = loader.load_model(str(policy())), loader.load_tokenizer(str(policy()))
    export_run(run, model, words, base=str(policy()), data="x", card_summary="trained")
    before = {file.name: file.read_bytes() for file in run.export_folder.iterdir()}

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(words), "save_pretrained", killed)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    with pytest.raises(KeyboardInterrupt):
        export_run(run, model, words, base=str(policy()), data="x", card_summary="trained")
    assert {file.name: file.read_bytes() for file in run.export_folder.iterdir()} == before
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def described(folder: Path, **stage: object) -> Path:
    """An export that says that it was trained so."""
    config = {"model": {"class_path": "dpo.training.dpo.DPO", "init_args": stage}}
    (folder / "train_config.yaml").write_text(yaml.safe_dump(config))
    return folder


def chosen(name: str, **options: object) -> dict[str, object]:
    return {"class_path": f"dpo.{name}", "init_args": options}


def test_an_export_says_what_it_was_trained_against(tmp_path: Path) -> None:
    def found(named: str | None = None, **stage: object) -> str:
        return read_origin(str(described(tmp_path, **stage)), named).reference_path

    assert found(policy="some/base", reference=chosen("reference.Copy")) == "some/base"
    assert found("other/base", policy="some/base") == "other/base"
    model = chosen("reference.Model", path="b/c")
    assert found(policy="a", reference=model) == "b/c"
    assert found(policy="a", reference=chosen("cached.Cached", of=model)) == "b/c"
    assert found(policy="a", reference=chosen("cached.Cached", of=chosen("reference.Copy"))) == "a"
    assert found(policy="a") == "a" and found(policy="quickstart").endswith("policy")
    config = {"peft_type": "LORA", "base_model_name_or_path": "the/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert found(policy=str(tmp_path), reference=chosen("reference.AdapterOff")) == "the/base"
    assert found(policy=str(tmp_path), reference=chosen("reference.Copy")) == str(tmp_path)
    with pytest.raises(ValueError, match="--reference"):
        found()
    with pytest.raises(ValueError, match=r"last.ckpt, which has it, is gone"):
        found(policy="a", reference=chosen("reference.Moving", alpha=0.6, tau=512))


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
def test_beta_is_the_one_of_the_rewards(tmp_path: Path, loss: PreferenceLoss) -> None:
    def written(loss: PreferenceLoss) -> dict[str, object]:
        inside = {"loss": written, "losses": lambda losses: [written(one) for one in losses]}
        options = {name: inside.get(name, lambda value: value)(value) for name, value in vars(loss).items()}
        return chosen(f"losses.{type(loss).__name__}", **{n: v for n, v in options.items() if n in (*inside, "beta")})

    logps = PairLogps(torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -2.0]), torch.zeros(2), (1, 1))
    beta = loss.rewards(logps)[0, 0].item()  # of a log-ratio of 1
    assert beta == pytest.approx(0.3)
    assert read_origin(str(described(tmp_path, policy="a", loss=written(loss)))).beta == pytest.approx(beta)


@pytest.mark.parametrize(
    ("loss", "compared"),
    [
        (chosen("losses.DPO", beta=0.3), True),
        (chosen("losses.SimPO", beta=2.0), False),
        (chosen("losses.Sum", losses=[chosen("losses.SimPO"), chosen("losses.NLL")]), False),
        (chosen("losses.Sum", losses=[chosen("losses.NLL"), chosen("losses.DPO")]), True),
        (None, False),  # a supervised stage chooses none
    ],
)
def test_a_run_without_a_reference_says_what_stands_in_for_it(
    tmp_path: Path, loss: dict[str, object] | None, compared: bool
) -> None:
    folder = described(tmp_path, policy="the/start", **({"loss": loss} if loss else {}))
    found, named = read_origin(str(folder)), read_origin(str(folder), "another/model")
    assert (found.reference_path, found.has_reference) == ("the/start", compared)
    assert ("trained without a reference" in found.reference_note) is not compared
    assert (named.reference_path, named.has_reference, named.reference_note) == ("another/model", True, "")


def test_without_a_configuration_the_reference_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--reference"):
        read_origin(str(tmp_path))
    found = read_origin(str(tmp_path), "a/b")
    assert (found.reference_path, found.beta, found.format, found.run.folder) == ("a/b", 0.1, "auto", tmp_path)

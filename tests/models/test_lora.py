"""Adapters: which weights train, merged weights, files, and gradients against those of a plain forward pass."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo.models import lora
from dpo.models.batch import Batch, Example, collate
from dpo.models.loading import ModelLoader, adapter_base_model, prepare_layers, read_end_ids, weights_sha256
from dpo.models.lora import Adapter, AsLoaded, LoRA, QLoRA
from dpo.models.prompt_sharing import share_if_exact
from dpo.models.scoring import score
from dpo.runs.folder import Run
from tests.support.runs import Lab, checkpoint, pairs, policy

IDS = torch.arange(3, 40)[None]
# Family, tied head, targets: attention only, the head (tied and not), transposed layers, embeddings, capped logits.
CASES: dict[str, tuple[str, bool, tuple[str, ...]]] = {
    "attention": ("llama", False, ("q_proj", "v_proj")),
    "all-linear": ("llama", False, ("all-linear",)),
    "head": ("llama", False, ("q_proj", "lm_head")),
    "tied head": ("llama", True, ("all-linear", "lm_head")),
    "embeddings": ("llama", True, ("embed_tokens",)),
    "transposed": ("gpt2", True, ("all-linear", "lm_head")),
    "capped": ("gemma2", True, ("all-linear", "lm_head")),
    "one layer": ("llama", False, ("layers.1.self_attn.q_proj",)),
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("runs"))


@pytest.fixture(params=CASES)
def case(
    request: pytest.FixtureRequest, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> tuple[Path, LoRA]:
    family, tied, targets = CASES[request.param]
    tiny_model(family, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    return tmp_path / "base", LoRA(4, 8, targets)


def trained(adapter: Adapter, path: Path, seed: int = 0) -> PreTrainedModel:
    """Load a policy and give all weights that train random values, so that its adapter has an effect."""
    model = adapter.load_policy(ModelLoader(), str(path))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=draw) / 5)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits


def test_only_a_new_adapter_trains_and_it_has_no_effect_yet(case: tuple[Path, LoRA]) -> None:
    base, adapter = case
    plain, model = ModelLoader().load_model(str(base)), adapter.load_policy(ModelLoader(), str(base))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and all("lora_" in name for name in names)
    assert not any(part.training for part in model.modules())
    assert lora.equals_base_model(model) and torch.equal(logits(model), logits(plain))
    assert not lora.equals_base_model(trained(adapter, base))


def test_the_model_without_its_adapter_is_the_base_and_shares_its_weights(case: tuple[Path, LoRA]) -> None:
    base, adapter = case
    plain, model = ModelLoader().load_model(str(base)), trained(adapter, base)
    off = lora.model_without_adapter(model)
    assert weights_sha256(off) == weights_sha256(plain), "names and bytes of the base"
    own = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in own for p in off.parameters()), "every weight is shared"
    assert torch.equal(logits(off), logits(plain)) and not torch.allclose(logits(model), logits(plain), atol=0.1)


def test_a_merged_model_computes_the_same_and_is_an_ordinary_one(case: tuple[Path, LoRA], tmp_path: Path) -> None:
    base, adapter = case
    model = trained(adapter, base)
    before = weights_sha256(model)
    merged = lora.merge_adapter(model)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)
    assert weights_sha256(model) == before, "merging changes a copy"
    for name, p in merged.named_parameters():
        assert torch.equal(lora.effective_weight(model, name), p)
    lora.save_model_or_adapter(merged, tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))


def test_merged_weights_are_base_plus_scaled_product(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    model = trained(LoRA(4, 8, ("q_proj",)), tmp_path / "base")
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer.weight + 8 / 4 * (b @ a)  # W + alpha / r * B A
    torch.testing.assert_close(lora.effective_weight(model, "model.layers.0.self_attn.q_proj.weight"), expected)


def test_an_adapter_is_saved_alone_and_loaded_unchanged(case: tuple[Path, LoRA], tmp_path: Path) -> None:
    base, adapter = case
    model = trained(adapter, base)
    folder = tmp_path / "adapter"
    lora.save_model_or_adapter(model, folder)
    assert {file.name for file in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
    }
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(p.numel() for p in load_file(folder / "adapter_model.safetensors").values()) == trains
    loaded = AsLoaded().load_policy(ModelLoader(), str(folder))
    assert torch.equal(logits(loaded), logits(model))
    assert sum(p.numel() for p in loaded.parameters() if p.requires_grad) == trains, "it can be trained further"
    assert adapter_base_model(str(folder)) == str(base)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:fan_in_fan_out is set")
def test_an_adapter_can_be_read_by_transformers_and_peft(case: tuple[Path, LoRA], tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM, PeftModel

    base, adapter = case
    model = trained(adapter, base)
    lora.save_model_or_adapter(model, tmp_path / "adapter")
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    by_auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    for read in (AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"), by_peft, by_auto):
        torch.testing.assert_close(logits(read), logits(model))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert config["target_modules"] == sorted(config["target_modules"])  # the same file from every process


@pytest.mark.parametrize("given", ["org/base", "models/base"])
def test_an_adapter_names_its_base_as_it_was_given(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder beside a hub id of the same name changes nothing."""
    monkeypatch.chdir(tmp_path)
    model = trained(LoRA(4, 8, ("q_proj",)), policy())
    model.save_pretrained(tmp_path / "models" / "base")
    model = LoRA(4, 8, ("q_proj",)).load_policy(ModelLoader(), str(policy()))
    (tmp_path / given).mkdir(parents=True, exist_ok=True)
    model.peft_config["default"].base_model_name_or_path = given  # what peft takes from a model of this name
    lora.save_model_or_adapter(model, tmp_path / "adapter")
    assert adapter_base_model("adapter") == given


def stored_types(folder: Path) -> set[torch.dtype]:
    return {weight.dtype for weight in load_file(folder / "model.safetensors").values()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_full_model_is_exported_in_the_number_format_of_its_base(
    stored: torch.dtype, tied: bool, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    tiny_model(tie_word_embeddings=tied).to(stored).save_pretrained(tmp_path / "base")
    for name, adapter in (("all", AsLoaded()), ("merged", LoRA(4, 8, ("q_proj",), merge=True))):
        model = trained(adapter, tmp_path / "base")
        before = weights_sha256(model)
        adapter.model_to_export(model).save_pretrained(tmp_path / name)
        assert weights_sha256(model) == before and model.dtype == torch.float32, "training may go on"
        assert stored_types(tmp_path / name) == {stored}
        read = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert read.dtype == stored
        wanted = lora.merge_adapter(model).state_dict()
        assert all(torch.equal(weight, wanted[key].to(stored)) for key, weight in read.state_dict().items())
        assert (tmp_path / name / "model.safetensors").stat().st_size == (
            tmp_path / "base" / "model.safetensors"
        ).stat().st_size


def test_a_full_model_is_exported_in_float32_on_request(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    adapters = (AsLoaded(export_dtype="float32"), LoRA(4, 8, ("q_proj",), merge=True, export_dtype="float32"))
    for adapter in adapters:
        exported = adapter.model_to_export(trained(adapter, tmp_path / "base"))
        assert {p.dtype for p in exported.parameters()} == {torch.float32}


def test_a_float32_base_and_an_adapter_are_exported_as_they_are(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    model = trained(AsLoaded(), tmp_path / "base")
    assert AsLoaded().model_to_export(model) is model
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    adapter = LoRA(4, 8, ("q_proj",))
    model = trained(adapter, tmp_path / "half")
    assert adapter.model_to_export(model) is model, "an adapter keeps all digits"


def test_the_number_format_of_the_export_does_not_keep_a_run_from_resuming() -> None:
    assert str(AsLoaded(export_dtype="float32")) == str(AsLoaded()) == "AsLoaded(four_bits=False, merge=False)"


# Gradients of the scorer, with shared prompts and recomputed layers, against a plain forward of every sequence.


def batch() -> Batch:
    draw = torch.Generator().manual_seed(1)
    tokens = [torch.randint(3, 128, (n,), generator=draw).tolist() for n in (9, 5, 7, 4, 6, 3)]
    return collate([Example("a", tokens[0], (tokens[1], tokens[2])), Example("b", tokens[3], (tokens[4], tokens[5]))])


def textbook(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return log p of every scored token from all logits of whole sequences."""
    parts = []
    targets = batch.targets.split(batch.lengths)
    for sequence, target in zip(batch.answer_sequences(), targets, strict=True):
        logps = model(input_ids=sequence[None]).logits[0].float().log_softmax(-1)
        parts.append(logps[-len(target) :].gather(-1, target[:, None])[:, 0])
    return torch.cat(parts)


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_gradients_are_those_of_a_plain_forward(case: tuple[Path, LoRA], recomputed: bool) -> None:
    base, adapter = case
    plain, model = trained(adapter, base), trained(adapter, base)
    weights = torch.linspace(-1, 1, len(batch().targets))
    (textbook(plain, batch()) * weights).sum().backward()
    assert share_if_exact(model) == ""
    prepare_layers(model, compile_layers=False, gradient_checkpointing=recomputed)
    (score(model, batch()).logps * weights).sum().backward()
    expected = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad == (expected[name].grad is not None), name
        if p.requires_grad:
            assert expected[name].grad.abs().max() > 1e-3, name
            scale = float(expected[name].grad.abs().max())
            torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-4, atol=1e-5 * scale, msg=name)


# Refusals.


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (LoRA(targets=()), "expected all-linear or some of .*'q_proj'.* got 'nothing'"),
        (LoRA(targets=("q_proj", "query")), "expected all-linear or some of .*'q_proj'.* got 'query'"),
        (AsLoaded(four_bits=True), "bitsandbytes|CUDA"),
        (QLoRA(), "bitsandbytes|CUDA"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="4-bit weights work here")
def test_impossible_adapters_are_refused(adapter: Adapter, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapter.load_policy(ModelLoader(), str(policy()))


@pytest.mark.parametrize("name", ["r", "alpha"])  # with alpha 0 it would train nothing
def test_impossible_ranks_are_refused_at_once(name: str) -> None:
    with pytest.raises(ValueError, match=f"--model.adapter.{name}: expected at least 1, got 0"):
        LoRA(**{name: 0})


def test_merging_needs_an_adapter() -> None:
    with pytest.raises(
        ValueError, match=r"--model\.adapter\.merge: .* has no adapter\. To add one: --model\.adapter LoRA"
    ):
        AsLoaded(merge=True).load_policy(ModelLoader(), str(policy()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter on the random policy."""
    lora.save_model_or_adapter(trained(LoRA(4, 8, ("q_proj",)), policy()), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_no_adapter_is_added_to_an_adapter(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"is already an adapter: leave --model\.adapter out"):
        LoRA().load_policy(ModelLoader(), str(folder))


def test_an_adapter_without_a_tokenizer_uses_that_of_its_base(folder: Path) -> None:
    assert (
        ModelLoader().load_tokenizer(str(folder)).get_vocab() == ModelLoader().load_tokenizer(str(policy())).get_vocab()
    )
    (folder / "generation_config.json").unlink()
    assert read_end_ids(str(folder)) == read_end_ids(str(policy())) == [2]


def test_pickled_adapters_are_read_only_if_allowed(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()
    with pytest.raises(ValueError, match=r"cannot read an adapter from .*adapter_model\.safetensors"):
        ModelLoader().load_model(str(folder))
    assert lora.adapter_layers(ModelLoader(pickled_weights=True).load_model(str(folder)))


@pytest.mark.parametrize("change", ["renamed", "missing", "other size"])
def test_an_adapter_that_does_not_fit_is_refused(folder: Path, change: str) -> None:
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    first = sorted(weights)[0]
    value = weights.pop(first)
    if change != "missing":
        weights |= {first + "x": value} if change == "renamed" else {first: value[:, :-1].contiguous()}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="fit"):
        ModelLoader().load_model(str(folder))


@pytest.mark.parametrize("change", [{"peft_type": "IA3"}, {"modules_to_save": ["lm_head"]}])
def test_adapters_other_than_lora_are_refused(folder: Path, change: dict[str, object]) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match="expected a LoRA adapter without modules_to_save"):
        ModelLoader().load_model(str(folder))


# Whole runs.

WORDS = ["--trainer.max_steps=4", "--trainer.val_check_interval=2", "--optimizer.lr=1e-2"]
HEAD = ["--model.adapter=LoRA", "--model.adapter.r=4", "--model.adapter.targets=[q_proj,lm_head]"]


@pytest.fixture(scope="module")
def run(lab: Lab) -> Run:
    """Four steps with an adapter on the queries and on the head."""
    return lab.fit("adapter", *WORDS, *HEAD)


def test_checkpoints_hold_only_the_adapter_and_its_moments(run: Run) -> None:
    saved = checkpoint(run)
    names = saved["state_dict"].keys()
    assert names and all(name.startswith("policy.") and ".lora_" in name for name in names)
    moments = saved["optimizer_states"][0]["state"]
    assert sum(state["exp_avg"].numel() for state in moments.values()) == sum(
        p.numel() for p in saved["state_dict"].values()
    )
    full = sum(file.stat().st_size for file in policy().glob("*.safetensors"))
    assert (run.checkpoint_folder / "last.ckpt").stat().st_size < min(full / 2, 300_000)


def test_the_export_is_the_trained_adapter(run: Run) -> None:
    assert not (run.export_folder / "model.safetensors").exists()
    assert (run.export_folder / "adapter_model.safetensors").stat().st_size < 50_000
    assert oct((run.export_folder / "adapter_model.safetensors").stat().st_mode)[-3:] == "644"
    model, base = (AsLoaded().load_policy(ModelLoader(), str(path)) for path in (run.export_folder, policy()))
    weights = dict(model.named_parameters())
    for name, value in checkpoint(run)["state_dict"].items():
        assert torch.equal(weights[name.removeprefix("policy.")], value)
    assert not torch.allclose(logits(model), logits(base), atol=1e-3)
    before = dict(base.named_parameters())
    for name, p in lora.model_without_adapter(model).named_parameters():
        assert torch.equal(p, before[name]), "the base is unchanged"


def test_a_merged_export_is_a_full_model(lab: Lab, run: Run) -> None:
    merged = lab.fit("merged", *WORDS, *HEAD, "--model.adapter.merge=true")
    assert not (merged.export_folder / "adapter_config.json").exists()
    full = AutoModelForCausalLM.from_pretrained(merged.export_folder)
    torch.testing.assert_close(
        logits(full), logits(ModelLoader().load_model(str(run.export_folder))), rtol=1e-4, atol=1e-4
    )


def test_an_adapter_is_trained_further_against_itself_before_training(
    lab: Lab, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    more = lab.fit("more", *WORDS, f"--model.policy={run.export_folder}")
    log = caplog.text
    trains = sum(value.numel() for value in checkpoint(run)["state_dict"].values())
    assert f"{trains:,} parameters train" in log and "policy and reference are 0 nats per token apart" in log
    assert "frozen copy of the adapter as it was loaded" in log
    before, after = checkpoint(run)["state_dict"], checkpoint(more)["state_dict"]
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before), "every weight of it changes"


def test_resuming_is_exact(lab: Lab, run: Run) -> None:
    words = [word for word in WORDS if "max_steps" not in word]
    part = lab.fit("part", *words, *HEAD, "--trainer.max_steps=2")
    assert lab.main("fit", *WORDS, *HEAD, f"--ckpt_path={part.checkpoint_folder / 'last.ckpt'}") == 0
    expected, found = (checkpoint(r)["state_dict"] for r in (run, part))
    assert expected.keys() == found.keys() and all(torch.equal(expected[n], found[n]) for n in expected)


def test_a_checkpoint_of_another_model_is_refused(lab: Lab, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    last = f"--ckpt_path={run.checkpoint_folder / 'last.ckpt'}"
    for words in ([], ["--model.adapter=LoRA", "--model.adapter.targets=[q_proj]"], [*HEAD, "--model.adapter.r=8"]):
        assert lab.main("fit", "--name=other", *WORDS, *words, last) == 1
        assert "expected --model.adapter LoRA(r=4" in capsys.readouterr().err


def test_supervised_training_takes_adapters_too(lab: Lab) -> None:
    run = lab.fit("supervised", "--model=SFT", f"--model.policy={policy()}", *WORDS, *HEAD, f"--data.path={pairs()}")
    assert all(".lora_" in name for name in checkpoint(run)["state_dict"])
    assert (run.export_folder / "adapter_config.json").exists()

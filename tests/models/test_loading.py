"""Models are loaded in float32, from safetensors and without running their code; errors name what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dpo import quickstart
from dpo.models.loading import ModelLoader, prepare_layers, read_end_ids, resolve_model_path, weights_sha256
from tests.support.models import make_tiny_model
from tests.support.runs import policy


def test_a_model_is_read_in_float32_with_dropout_off(tmp_path: Path) -> None:
    make_tiny_model("gpt2").to(torch.bfloat16).train().save_pretrained(tmp_path)
    model = ModelLoader().load_model(str(tmp_path))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(part.training for part in model.modules())


def test_quickstart_is_the_shipped_policy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model_path("quickstart") == str(quickstart.POLICY_FOLDER)
    assert resolve_model_path("~/model") == str(tmp_path / "model")
    assert resolve_model_path("someone/model") == "someone/model"
    assert weights_sha256(ModelLoader().load_model("quickstart")) == weights_sha256(
        ModelLoader().load_model(str(quickstart.POLICY_FOLDER))
    )


@pytest.mark.parametrize("path", ["/nowhere", "someone/not-here", "./nowhere"])
def test_a_missing_model_is_named(path: str) -> None:
    with pytest.raises(ValueError, match=path):
        ModelLoader().load_model(path)
    with pytest.raises(ValueError, match=path):
        ModelLoader().load_tokenizer(path)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    make_tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"cannot read a tokenizer from '{tmp_path}'"):
        ModelLoader().load_tokenizer(str(tmp_path))


def test_pickled_weights_are_read_only_if_allowed(tmp_path: Path) -> None:
    model = make_tiny_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"--model\.pickled_weights true"):
        ModelLoader().load_model(str(tmp_path))
    assert weights_sha256(ModelLoader(pickled_weights=True).load_model(str(tmp_path))) == weights_sha256(model)


def test_incomplete_weights_are_refused(tmp_path: Path) -> None:
    make_tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file({name: weight for name, weight in weights.items() if "layers.1." not in name}, file, {"format": "pt"})
    lost = [name for name in weights if "layers.1." in name]
    with pytest.raises(ValueError, match=rf"{len(lost)} are missing and would be random \(model\.layers\.1\."):
        ModelLoader().load_model(str(tmp_path))


def test_weights_are_aligned_wherever_they_are_in_the_file(tmp_path: Path) -> None:
    make_tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for padding in ("", "8 bytes."):
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt", "padding": padding})
        assert not any(p.data_ptr() % 64 for p in ModelLoader().load_model(str(tmp_path)).parameters())


def test_truncated_weights_are_named(tmp_path: Path) -> None:
    make_tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"cannot read a causal language model from '{tmp_path}'"):
        ModelLoader().load_model(str(tmp_path))


def test_weights_that_do_not_fit_the_configuration_are_named(tmp_path: Path) -> None:
    make_tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"hidden_size": 2 * config["hidden_size"]}))
    with pytest.raises(ValueError, match=f"cannot read a causal language model from '{tmp_path}'"):
        ModelLoader().load_model(str(tmp_path))


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(__file__).with_name("executed").touch() if False else Path("executed").touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_model_is_run_only_if_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "own"
    make_tiny_model().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE)
    with pytest.raises(ValueError, match=r"--model\.trust_remote_code true"):
        ModelLoader().load_model(str(folder))
    assert not Path("executed").exists()
    assert type(ModelLoader(trust_remote_code=True).load_model(str(folder))).__name__ == "OwnModel"
    assert Path("executed").exists()


def test_the_hash_covers_every_name_type_shape_and_byte() -> None:
    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))

    same, value, buffer, dtype = build(), build(), build(), build()
    with torch.no_grad():
        value[0].weight[1, 1] += 1e-6
        buffer[1].running_mean[0] = 1e-6
    dtype[0].double()
    name = torch.nn.ModuleDict({"0": build()[0], "2": build()[1]})
    shape = build()
    shape[0].weight.data = shape[0].weight.data.reshape(2, 3)
    hashes = [weights_sha256(model) for model in (build(), value, buffer, dtype, name, shape)]
    assert weights_sha256(same) == hashes[0]
    assert len(set(hashes)) == len(hashes)


def test_the_hash_is_that_of_the_weights_and_not_of_the_file(tmp_path: Path) -> None:
    shutil.copytree(policy(), tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("another file")
    first, second = (ModelLoader().load_model(str(folder)) for folder in (policy(), tmp_path / "copy"))
    assert weights_sha256(first) == weights_sha256(second)


@pytest.mark.parametrize("ends", [2, [2, 5], None])
def test_the_ids_that_end_an_answer_are_those_of_the_generation_config(tmp_path: Path, ends: object) -> None:
    model = make_tiny_model()
    model.generation_config.eos_token_id = ends
    model.save_pretrained(tmp_path)
    assert read_end_ids(str(tmp_path)) == ([] if ends is None else [2] if ends == 2 else ends)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    assert read_end_ids(str(tmp_path)) == []


def test_recomputed_layers_give_the_same_gradients() -> None:
    ids = torch.arange(3, 40)[None]
    gradients = []
    for recomputed in (False, True):
        model = AutoModelForCausalLM.from_pretrained(policy())
        prepare_layers(model, compile_layers=False, gradient_checkpointing=recomputed)
        model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize(("compiled", "option"), [(False, "gradient_checkpointing"), (True, "compile")])
def test_options_for_layers_are_refused_for_a_model_that_marks_none(compiled: bool, option: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("openai-gpt", n_embd=32, n_head=4, n_layer=2))
    with pytest.raises(ValueError, match=rf"--model\.{option}: OpenAIGPTLMHeadModel does not say what its layers are"):
        prepare_layers(model, compile_layers=compiled, gradient_checkpointing=not compiled)
    prepare_layers(model, compile_layers=False, gradient_checkpointing=False)

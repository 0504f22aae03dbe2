"""Frozen weights in bfloat16: the same bits under autocast, half of the memory, and nothing lost elsewhere."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from dpo.models import lora
from dpo.models.half import HalfLinear, halve_frozen_weights
from dpo.models.loading import ModelLoader
from dpo.models.lora import LoRA
from dpo.models.prompt_sharing import enable_prefix_sharing
from dpo.models.reference import Copy, Moving
from dpo.models.scoring import score
from dpo.runs.folder import Run
from tests.support.models import make_tiny_model
from tests.support.runs import Lab, metrics, policy
from tests.support.sharing import random_batch


def linear_bytes(model: nn.Module) -> int:
    return sum(part.weight.nbytes for part in model.modules() if isinstance(part, nn.Linear))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_log_probabilities_are_equal_to_the_bit_and_the_weights_half_as_large(family: str, tied: bool) -> None:
    model = make_tiny_model(family, tie_word_embeddings=tied).requires_grad_(False)
    enable_prefix_sharing(model)
    halved = copy.deepcopy(model)
    halve_frozen_weights(halved, may_round=True)
    batch = random_batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(score(halved, batch).logps, score(model, batch).logps)
    head = model.get_output_embeddings().weight.nbytes if tied else 0
    assert linear_bytes(halved) - head == (linear_bytes(model) - head) // 2
    embedding = halved.get_input_embeddings().weight
    assert embedding.dtype == torch.float32 and (halved.get_output_embeddings().weight is embedding) == tied


def test_weights_that_train_stay_and_what_is_shared_is_decided_by_the_policy() -> None:
    trained = ModelLoader().load_model(str(policy()))
    reference = Copy().build_reference(trained, ModelLoader())
    sha256 = reference.sha256
    reference.halve_weights(trained)
    halve_frozen_weights(trained, may_round=False)
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert reference.sha256 == sha256 and any(isinstance(part, HalfLinear) for part in reference.modules())
    adapted = LoRA(4, 8).load_policy(ModelLoader(), str(policy()))
    base = Copy().build_reference(adapted, ModelLoader())
    halve_frozen_weights(adapted, may_round=False)
    base.halve_weights(adapted)
    assert torch.bfloat16 not in {p.dtype for p in base.parameters()}, "random float32 weights are no bfloat16 numbers"


@torch.no_grad()
def test_an_exact_base_is_halved_merged_and_used_without_autocast_as_before() -> None:
    adapted = LoRA(4, 8).load_policy(ModelLoader(), str(policy()))
    for name, p in adapted.named_parameters():
        p.copy_(torch.randn_like(p) / 10 if ".lora_" in name else p.to(torch.bfloat16).float())
    moving = Moving(alpha=0.5, tau=1).build_reference(adapted, ModelLoader())
    merged = lora.merge_adapter(adapted)
    before, batch = score(adapted, random_batch()).logps, random_batch()
    size = linear_bytes(adapted)
    halve_frozen_weights(adapted, may_round=False)
    moving.halve_weights(adapted)
    assert linear_bytes(adapted) < 0.75 * size
    assert torch.equal(score(adapted, batch).logps, before)
    again = LoRA(4, 8, merge=True, export_dtype="float32").model_to_export(adapted)
    for name, weight in merged.named_parameters():
        assert again.get_parameter(name).dtype == torch.float32 and torch.equal(again.get_parameter(name), weight), name
    assert all(moving.model.get_parameter(name).dtype == torch.float32 for name in moving.moving_names)
    moving.update_from(adapted, 1)
    score(moving.model, batch)


@pytest.mark.parametrize("adapter", [[], ["--model.adapter=LoRA", "--model.adapter.merge=true"]], ids=["copy", "lora"])
def test_a_run_in_mixed_precision_begins_at_log_two_and_is_the_same(
    tmp_path: Path, adapter: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = Lab(tmp_path)
    words = ["--trainer.precision=bf16-mixed", "--trainer.max_steps=2", "--optimizer.lr=1e-2", *adapter]
    with_halves = lab.fit("halves", *words)
    monkeypatch.setattr("dpo.training.base.Stage.halve_weights", lambda self: None)
    monkeypatch.setattr("dpo.training.dpo.DPO.halve_weights", lambda self: None)
    without = lab.fit("whole", *words)
    first = metrics(with_halves)[0]
    assert torch.tensor(first["train/loss"]) == torch.tensor(2.0).log(), "exactly"
    for row, other in zip(metrics(with_halves), metrics(without), strict=True):
        losses = [name for name in row if "time" not in name and "second" not in name]
        assert [row[name] for name in losses] == [other[name] for name in losses]
    assert exported(with_halves) == exported(without)


def exported(run: Run) -> bytes:
    return next(run.export_folder.glob("*.safetensors")).read_bytes()

"""References: what each one is, that fixed ones never change, and that moving ones follow their formula."""

import logging
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo.models import lora
from dpo.models.batch import Example, collate
from dpo.models.loading import ModelLoader, weights_sha256
from dpo.models.lora import LoRA
from dpo.models.prompt_sharing import share_if_exact
from dpo.models.reference import AdapterOff, Copy, FrozenReference, Model, Moving, MovingReference, Nothing, Reference
from dpo.models.scoring import score
from dpo.runs.folder import Run
from dpo.training.precomputed import Cached
from tests.support.runs import Lab, checkpoint, policy, weights

BATCH = collate([Example("a", [5, 6, 7], ([8, 9, 2], [10, 2])), Example("b", [11, 12], ([13, 2], [14, 15, 2]))])
LORA = ["--model.adapter=LoRA", "--model.adapter.r=4", "--model.adapter.targets=[q_proj,lm_head]"]
FIT = ["--trainer.max_steps=6", "--trainer.val_check_interval=2", "--optimizer.lr=1e-2"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("runs"))


def read(adapter: LoRA | None = None, path: Path | None = None) -> PreTrainedModel:
    path = str(path or policy())
    return adapter.load_policy(ModelLoader(), path) if adapter else ModelLoader().load_model(path)


@torch.no_grad()
def train(model: PreTrainedModel, seed: int = 0) -> None:
    """Add noise to every weight that trains."""
    draw = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=draw) / 10)


@pytest.fixture
def loaded(tmp_path: Path) -> PreTrainedModel:
    """A policy that was loaded from an adapter with an effect."""
    model = read(LoRA(4, 8, ("q_proj", "lm_head")))
    train(model)
    lora.save_model_or_adapter(model, tmp_path / "adapter")
    return read(path=tmp_path / "adapter")


# What each is.


def test_a_copy_of_a_full_policy_shares_no_weights_and_stays() -> None:
    model = read()
    reference = Copy().build_reference(model, ModelLoader())
    before = reference(BATCH)
    assert torch.equal(before, score(model, BATCH).logps.detach()) and not before.requires_grad
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in reference.model.parameters()}
    train(model)
    assert torch.equal(reference(BATCH), before) and reference.sha256 == weights_sha256(reference.model)
    assert reference.sha256 == weights_sha256(read()) and reference.description == "frozen copy of the policy"


def test_the_copy_of_a_new_adapter_is_the_base_without_a_second_model() -> None:
    model = read(LoRA(4, 8, ("q_proj", "lm_head")))
    reference = Copy().build_reference(model, ModelLoader())
    assert {p.data_ptr() for p in reference.parameters()} <= {p.data_ptr() for p in model.parameters()}
    assert reference.description == "the policy with its adapter off, weights shared"
    assert reference.sha256 == weights_sha256(read()), "the same reference as that of full training"
    before = reference(BATCH)
    assert torch.equal(before, score(model, BATCH).logps.detach())
    train(model)
    assert torch.equal(reference(BATCH), before) and torch.equal(before, score(read(), BATCH).logps.detach())


def test_the_copy_of_a_loaded_adapter_is_that_adapter_before_training(loaded: PreTrainedModel) -> None:
    reference = Copy().build_reference(loaded, ModelLoader())
    before = reference(BATCH)
    assert torch.equal(before, score(loaded, BATCH).logps.detach())
    assert not torch.allclose(before, score(read(), BATCH).logps, atol=1e-2), "not the base"
    copies = {p.data_ptr() for p in reference.parameters()} - {p.data_ptr() for p in loaded.parameters()}
    assert len(copies) == sum(p.requires_grad for p in loaded.parameters()), "only the adapter is in memory twice"
    train(loaded, seed=1)
    assert torch.equal(reference(BATCH), before)


def test_a_loaded_adapter_can_be_off_too(loaded: PreTrainedModel) -> None:
    reference = AdapterOff().build_reference(loaded, ModelLoader())
    assert torch.equal(reference(BATCH), score(read(), BATCH).logps.detach())
    assert reference.initial_distance == float("inf"), "it need not equal the policy"


def test_adapter_off_needs_an_adapter() -> None:
    with pytest.raises(ValueError, match="AdapterOff: the policy has no adapter"):
        AdapterOff().build_reference(read(), ModelLoader())


def test_another_model_must_have_the_same_vocabulary(
    tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    tiny_model(vocab_size=64).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a vocabulary of 64 tokens, the policy one of"):
        Model(str(tmp_path)).build_reference(read(), ModelLoader())


@pytest.mark.parametrize("sharing", [True, False])
def test_interleaved_passes_do_not_disturb_each_other(loaded: PreTrainedModel, sharing: bool) -> None:
    """The graph of the policy's pass is still valid after a pass of the reference, which shares its weights."""
    reference, alone = Copy().build_reference(loaded, ModelLoader()), deepcopy(loaded)
    for model in (loaded, reference.model, alone):
        assert not sharing or share_if_exact(model) == ""
    score(alone, BATCH).logps.sum().backward()
    logps = score(loaded, BATCH).logps
    reference(BATCH)
    logps.sum().backward()
    expected = dict(alone.named_parameters())
    for name, p in loaded.named_parameters():
        assert (p.grad is None) == (not p.requires_grad)
        assert p.grad is None or torch.equal(p.grad, expected[name].grad)
    assert all(p.grad is None for p in reference.parameters() if not any(p is own for own in loaded.parameters()))


# Moving references.


@pytest.mark.parametrize(("alpha", "tau"), [(0.3, 2), (1.0, 3), (0.01, 1)], ids=["soft", "hard", "average"])
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapter"])
def test_a_moving_reference_follows_the_formula(alpha: float, tau: int, adapted: bool) -> None:
    model = read(LoRA(4, 8, ("q_proj", "lm_head")) if adapted else None)
    reference = Moving(alpha, tau).build_reference(model, ModelLoader())
    assert reference.description == f"moving by {alpha:g} towards the policy every {tau} steps, first a copy of it"
    expected = {name: p.clone() for name, p in lora.merge_adapter(model).named_parameters()}
    assert torch.equal(reference(BATCH), score(model, BATCH).logps.detach())
    for step in range(1, 7):
        train(model, seed=step)
        reference.update_from(model, step)
        if step % tau == 0:  # pi_ref <- alpha pi + (1 - alpha) pi_ref
            now = dict(lora.merge_adapter(model).named_parameters())
            expected = {name: p.lerp(now[name], alpha) for name, p in expected.items()}
        for name, p in reference.model.named_parameters():
            assert torch.equal(p, expected[name]), (step, name)
    assert not torch.allclose(reference(BATCH), score(read(), BATCH).logps, atol=1e-3)


def test_after_a_hard_update_the_reference_is_the_policy() -> None:
    model = read(LoRA(4, 8, ("q_proj",)))
    reference = Moving(alpha=1.0, tau=1).build_reference(model, ModelLoader())
    train(model)
    reference.update_from(model, 1)
    torch.testing.assert_close(reference(BATCH), score(model, BATCH).logps, rtol=1e-5, atol=1e-5)


def test_effective_weights_are_averaged_and_not_the_factors_of_an_adapter() -> None:
    """The reference is (B1 A1 + B2 A2) / 2; ((B1 + B2) / 2) ((A1 + A2) / 2) is another matrix."""
    model = read(LoRA(4, 4, ("q_proj",)))
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    train(model, seed=1)
    reference = Moving(alpha=0.5, tau=1).build_reference(model, ModelLoader())
    first = [layer.lora_B["default"].weight.clone(), layer.lora_A["default"].weight.clone()]
    train(model, seed=2)
    second = [layer.lora_B["default"].weight, layer.lora_A["default"].weight]
    reference.update_from(model, 1)
    found = reference.model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    base = layer.base_layer.weight
    torch.testing.assert_close(found, base + (first[0] @ first[1] + second[0] @ second[1]) / 2)
    (b, a) = ((x + y) / 2 for x, y in zip(first, second, strict=True))
    assert not torch.allclose(found, base + b @ a, atol=1e-3)


def test_a_moving_reference_copies_only_layers_with_an_adapter() -> None:
    model = read(LoRA(4, 8, ("q_proj",)))
    reference = Moving().build_reference(model, ModelLoader())
    layers = range(model.config.num_hidden_layers)
    assert reference.checkpointed_names() == {f"model.model.layers.{i}.self_attn.q_proj.weight" for i in layers}
    own = {p.data_ptr() for p in model.parameters()}
    assert sum(p.data_ptr() not in own for p in reference.parameters()) == len(layers)


@pytest.mark.parametrize("wrong", [{"alpha": 0}, {"alpha": 1.5}, {"tau": 0}])
def test_options_outside_their_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected alpha in \(0, 1\] and tau of at least 1 step"):
        Moving(**wrong)


@pytest.mark.parametrize("of", [Moving(), Nothing(), Cached()])
def test_only_fixed_references_are_cached(of: Reference) -> None:
    with pytest.raises(ValueError, match="Cached: expected a reference that does not change"):
        Cached(of).build_reference(read(), ModelLoader())


# Whole runs.


def module_of(lab: Lab, name: str, *words: str) -> Any:
    """Train through the command line and return the module as it is at the end."""
    import dpo.cli.main

    seen = {}
    after = dpo.cli.main.TrainingCLI.after_fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo.cli.main.TrainingCLI, "after_fit", lambda cli: (seen.update(cli=cli), after(cli))[1])
        lab.fit(name, *FIT, *words)
    return seen["cli"].model


@pytest.mark.parametrize("words", [[], ["--model.sharing=false", *LORA]], ids=["full", "adapter"])
def test_a_fixed_reference_is_the_same_to_the_bit_after_training(lab: Lab, words: list[str]) -> None:
    module = module_of(lab, f"fixed{len(words)}", *words)
    assert isinstance(module.reference, FrozenReference)
    found, start = module.reference.model.state_dict(), read().state_dict()
    assert found.keys() == start.keys() and all(torch.equal(found[name], start[name]) for name in start)
    assert weights_sha256(module.reference.model) == module.reference.sha256


def recorded(lab: Lab, name: str, *words: str) -> tuple[list[int], list[dict[str, Tensor]], Any]:
    """Train with a moving reference; return the steps of its updates, the policy's weights then, and the module."""
    steps: list[int] = []
    policies: list[dict[str, Tensor]] = []
    update = MovingReference.update_from

    def recording(self: MovingReference, model: PreTrainedModel, step: int) -> None:
        steps.append(step)
        policies.append({n: lora.effective_weight(model, n).detach().clone() for n in self.moving_names})
        update(self, model, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MovingReference, "update_from", recording)
        module = module_of(lab, name, "--model.reference=Moving", *words)
    return steps, policies, module


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapter"])
def test_it_is_updated_once_per_optimizer_step(lab: Lab, adapted: bool) -> None:
    words = ["--model.reference.alpha=0.5", "--model.reference.tau=2", "--trainer.accumulate_grad_batches=2"]
    steps, policies, module = recorded(lab, f"moving{adapted}", *words, *(LORA if adapted else []))
    assert steps == [1, 2, 3, 4, 5, 6]
    start = read().state_dict()
    for name in module.reference.moving_names:
        expected = start[name]
        for index in (1, 3, 5):  # after steps 2, 4 and 6
            expected = expected.lerp(policies[index][name], 0.5)
        found = module.reference.model.get_parameter(name)
        assert torch.equal(found, expected) and not torch.equal(found, start[name]), name
        saved = weights(Run(lab.folder / f"moving{adapted}"))
        assert torch.equal(saved[f"reference.model.{name}"], expected)


@pytest.mark.parametrize(
    "words",
    [
        ["--model.reference=Moving", "--model.reference.tau=2", *LORA],
        ["--model.reference=Moving", "--model.reference.tau=1", "--model.reference.alpha=0.01"],
        ["--model.reference=Cached", *LORA],
        ["--model.reference=AdapterOff", *LORA],
    ],
    ids=["moving", "average", "cached", "off"],
)
def test_resuming_is_exact(lab: Lab, words: list[str], request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.id
    whole = lab.fit(f"{name}-whole", *FIT, *words)
    part = lab.fit(f"{name}-part", *FIT, *words, "--trainer.max_steps=3")  # between two updates
    last = part.checkpoint_folder / "last.ckpt"
    assert lab.main("fit", *FIT, *words, f"--ckpt_path={last}") == 0
    expected, found = checkpoint(whole), checkpoint(part)
    assert expected["state_dict"].keys() == found["state_dict"].keys()
    assert all(torch.equal(value, found["state_dict"][n]) for n, value in expected["state_dict"].items())
    assert any(n.startswith("reference.") for n in found["state_dict"]) == ("Moving" in words[0])


def test_a_run_reports_its_reference(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    other = policy(seed=1)
    lab.fit("says", "--trainer.max_steps=1", "--data.val_fraction=0", f"--model.reference={other}")
    sha = weights_sha256(read(path=other))
    assert f"Reference: the model {other}, SHA-256 of its weights {sha[:16]}." in caplog.text

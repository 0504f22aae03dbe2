"""Memory: how much of it logits take, what is tried before the first step, and what is said where it runs out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpo import DPO
from dpo.models import prompt_sharing, scoring
from dpo.models.prompt_sharing import enable_prefix_sharing, share_if_exact
from dpo.models.reference import FrozenReference
from dpo.models.scoring import score
from dpo.training import preflight, schedules
from dpo.training.metrics import MetricMeans
from tests.support.models import make_tiny_model
from tests.support.runs import Lab, metrics
from tests.support.sharing import random_batch

VOCABULARY, WIDTH = 128, 48


class MostLogits(TorchDispatchMode):
    """The most logits that any operation gives."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_weight = isinstance(result, Tensor) and WIDTH in result.shape
        if isinstance(result, Tensor) and result.shape[-1:] == (VOCABULARY,) and result.dim() > 1 and not is_weight:
            self.found = max(self.found, result.numel())
        return result


def gradients(chunk_logits: int | None) -> tuple[int, Tensor, list[Tensor]]:
    """Return the most logits in one tensor, the log-probabilities, and the gradients."""
    model = make_tiny_model(vocab_size=VOCABULARY, hidden_size=WIDTH)
    enable_prefix_sharing(model)
    model.chunk_logits = chunk_logits
    weight = model.get_output_embeddings().weight
    with MostLogits() as most:
        logps = score(model, random_batch()).logps
    return most.found, logps.detach(), list(torch.autograd.grad(logps.sum(), [weight]))


def test_an_option_bounds_the_logits_in_memory_and_changes_nothing() -> None:
    whole, logps, gradient = gradients(None)
    assert whole == len(logps) * VOCABULARY, "all at once, as they are few"
    few, again, others = gradients(VOCABULARY * 3)
    assert few <= VOCABULARY * 3
    torch.testing.assert_close(again, logps)
    torch.testing.assert_close(others, gradient)
    assert scoring.CHUNK_LOGITS * 4 == 128 * 2**20 and scoring.CUDA_CHUNK_LOGITS * 4 == 2**30, "as the option says"


def test_the_option_reaches_policy_and_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    original = scoring.hidden_states
    monkeypatch.setattr(scoring, "hidden_states", lambda m, b: seen.add(m.chunk_logits) or original(m, b))
    Lab(tmp_path).fit("one", "--model.chunk_logits=2000", "--trainer.max_steps=1", "--data.val_fraction=0")
    assert seen == {2000}


def test_the_preflight_leaves_no_trace_of_the_passes_it_tries() -> None:
    module = DPO()
    module.policy = make_tiny_model()
    module.reference = FrozenReference(make_tiny_model(), "a copy", 0.0)
    batch = random_batch()
    with torch.no_grad():
        (said,) = preflight._check_memory(module, batch)
    assert said == f"memory holds the largest micro-batch of an epoch, {len(batch.tokens)} tokens"
    assert all(p.grad is None for p in module.policy.parameters())
    assert not module.train_means.counts.any()


@pytest.mark.parametrize(
    ("words", "expected", "unsaid"),
    [
        (
            ["--data.max_tokens=null"],
            "got null (all tokens of a step), and CUDA out of memory. What takes less",
            "2.00",
        ),
        (["--data.max_tokens=100"], "--data.max_tokens 50 ", "4096"),
        (["--data.max_tokens=null"], "--data.max_tokens 4096 ", "2.00"),
        ([], "--model.gradient_checkpointing true", "2.00"),
        (["--model.gradient_checkpointing=true"], "--model.adapter LoRA", "--model.gradient_checkpointing"),
        (["--model.adapter=LoRA"], "--model.reference Cached", "--model.adapter"),
    ],
)
def test_where_memory_runs_out_the_options_that_need_less_are_named(
    tmp_path: Path, words: list[str], expected: str, unsaid: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(DPO, "training_step", full)
    assert Lab(tmp_path).main("fit", "--name=full", "--model.preflight=false", *words) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: --data.max_tokens: expected what memory holds, got ")
    assert expected in message and unsaid not in message


def half_on_the_cpu() -> MixedPrecision:
    """What ``--trainer.precision 16-mixed`` gives on CUDA; on a CPU Lightning takes bfloat16 instead."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=128.0))


@pytest.mark.parametrize("fused", ["null", "true"])
def test_float16_trains_with_the_defaults_and_with_a_fused_optimizer(tmp_path: Path, fused: str) -> None:
    words = ["--trainer.plugins=tests.training.test_memory.half_on_the_cpu", f"--optimizer.fused={fused}"]
    words += ["--trainer.max_steps=3", "--data.val_fraction=0", "--optimizer.lr=1e-3"]
    found = metrics(Lab(tmp_path).fit("half", *words))
    exact = metrics(Lab(tmp_path).fit("whole", *words[1:]))
    for row, other in zip(found, exact, strict=True):
        assert row["train/loss"] == pytest.approx(other["train/loss"], rel=0.02)
        assert row["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=0.1), "of unscaled gradients"


def test_only_an_undecided_optimizer_on_cuda_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    plain = schedules.default_optimizer([weight])
    assert schedules.suit_device(plain, gradients_scaled=False) is plain, "on a CPU"
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True, raising=False)
    fused = schedules.suit_device(plain, gradients_scaled=False)
    assert type(fused) is torch.optim.AdamW and fused.param_groups[0]["fused"] and fused._step_supports_amp_scaling
    assert {name: value for name, value in fused.param_groups[0].items() if name != "fused"} == {
        name: value for name, value in plain.param_groups[0].items() if name != "fused"
    }
    for decided in ({"fused": False}, {"foreach": True}):
        chosen = torch.optim.AdamW([weight], **decided)
        assert schedules.suit_device(chosen, gradients_scaled=False) is chosen
    other = torch.optim.RMSprop([weight])
    assert schedules.suit_device(other, gradients_scaled=False) is other, "it cannot be"


@pytest.mark.parametrize(
    ("kind", "error", "shares"), [(None, 5e-3, False), (torch.bfloat16, 5e-3, True), (torch.bfloat16, 0.05, False)]
)
def test_the_tolerance_of_sharing_is_that_of_the_type_computed_in(
    kind: torch.dtype | None, error: float, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_sharing, "sharing_error", lambda *_: error)
    model = make_tiny_model()
    if kind:
        model.model.layers[0].mlp.up_proj.compute_dtype = kind  # as layers of 4-bit weights have it
    assert (share_if_exact(model) == "") == shares


def test_sums_are_float32_where_float64_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MetricMeans().sums.dtype == torch.float64
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert MetricMeans().sums.dtype == torch.float32

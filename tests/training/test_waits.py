"""Between logged steps the host never waits for the device.

A step runs on the meta device: a number cannot be read from it, as its tensors have none, so whatever would make the
host wait for a GPU raises here. Copies to it that would block are counted. Neither a GPU nor a compiler is needed.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dpo import DPO
from dpo.models import attention
from dpo.models.prompt_sharing import enable_prefix_sharing
from dpo.models.reference import FrozenReference
from dpo.training.metrics import MetricMeans
from dpo.training.nonfinite import FiniteMonitor
from tests.support.models import FAMILIES, make_tiny_model
from tests.support.sharing import random_batch

FAMILIES_TRIED = ("llama", "qwen2", "gpt_neox", "mistral", "gemma2", "gemma3_text")
GEMMA3 = {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 8, "query_pre_attn_scalar": 8}


class BlockingCopies(TorchDispatchMode):
    """Collects the operations that copy from the host to the device and wait until that is done."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        from_host = any(isinstance(each, Tensor) and each.device.type == "cpu" and each.dim() for each in args)
        if from_host and isinstance(result, Tensor) and result.is_meta and not kwargs.get("non_blocking"):
            self.found.append(str(func))
        return result


class TensorsFromLists(TorchFunctionMode):
    """Collects the calls that make a tensor on the device from numbers of the host, which copy and wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("tensor", "new_tensor", "as_tensor") and result.is_meta:
            self.found.append(str(func))
        return result


def step(family: str) -> list[str]:
    """Score a batch under policy and reference, and do all that follows up to the optimizer; return blocking copies."""
    model = make_tiny_model(family)
    enable_prefix_sharing(model)
    module = DPO()
    reference = FrozenReference(make_tiny_model(family), "a copy", 0.0)
    enable_prefix_sharing(reference.model)
    module.policy, module.reference = model.to("meta"), reference.to("meta")
    means = MetricMeans(module.metric_names).to("meta")
    monitor = FiniteMonitor()
    monitor.counts = torch.zeros(2, device="meta")
    with BlockingCopies() as copies, TensorsFromLists() as lists:
        batch = random_batch().to("meta")
        losses = module.losses(batch, means)
        monitor.add_losses(batch.ids, losses)
        losses.sum().backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        monitor.close_step(1, norm)
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, norm)
    return copies.found + lists.found


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "gemma3_text", GEMMA3)
    enabled = torch.is_autocast_enabled  # which does not know the meta device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": kind != "meta" and enabled(kind))


@pytest.mark.parametrize("family", FAMILIES_TRIED)
def test_a_step_by_segments_never_waits(family: str) -> None:
    assert step(family) == []


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_step_with_the_kernel_never_waits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_kernel_supports", lambda *_: True)
    monkeypatch.setattr(attention, "varlen_attn", lambda q, k, v, *_, **__: q + k.sum() + v.sum())
    assert step(family) == []


def test_what_waits_is_noticed() -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        torch.ones((), device="meta").item()
    with BlockingCopies() as copies:
        torch.ones(2).to("meta", non_blocking=True)
        assert not copies.found
        torch.ones(2).to("meta")
    assert copies.found
    with TensorsFromLists() as lists:
        torch.ones((), device="meta").new_tensor([1.0, 2.0])
        torch.tensor([1.0, 2.0], device="meta")
    assert len(lists.found) == 2

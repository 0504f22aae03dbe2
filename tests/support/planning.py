"""A planned and a measured peak of memory, in a process of its own: ``python -m tests.support.planning CASE...``."""

import json
import os
import sys
import tempfile
from types import SimpleNamespace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dpo import DPO, LoRA
from dpo.data.sampler import Step
from dpo.models.batch import Batch, Example, collate
from dpo.planning.tracing import Variant, trace_step
from tests.support.models import make_tiny_model

SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3}
MODELS: dict[str, tuple[str, dict[str, Any], Any]] = {  # family, options of its configuration, adapter
    "untied": ("llama", {"vocab_size": 5000}, None),
    "tied": ("qwen2", {"vocab_size": 9000, "tie_word_embeddings": True}, None),
    "lora": ("llama", {"vocab_size": 5000}, LoRA()),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "copy": {},
    "cached": {"cached": True},
    "checkpointing": {"checkpointing": True},
    "bfloat16, in two": {"dtype": torch.bfloat16, "micro_batches": 2},
}


def make_batch(pairs: int) -> Batch:
    """Return a micro-batch of pairs of several lengths."""
    return collate([Example(str(i), [1] * (40 + i), ([1] * 30, [1] * (20 + 2 * i))) for i in range(pairs)])


class _Zeros(torch.nn.Module):
    def forward(self, batch: Batch) -> torch.Tensor:
        return torch.zeros_like(batch.targets, dtype=torch.float32)


def measured_peak(folder: str, adapter: Any, settings: dict[str, Any], batch: Batch) -> int:
    """Return bytes of weights, plus the most that torch's profiler saw allocated during two steps."""
    options = {"adapter": adapter} if adapter else {}
    stage = DPO(folder, gradient_checkpointing=settings.get("checkpointing", False), **options)
    stage.configure_model()
    if settings.get("cached"):
        stage.reference = _Zeros()  # type: ignore[assignment]
        stage.models_by_role = lambda: {"policy": stage.policy}  # type: ignore[method-assign]
    stage._trainer = SimpleNamespace(  # type: ignore[assignment]
        strategy=SimpleNamespace(backward=lambda loss, _: loss.backward()),
        world_size=1,
        accumulate_grad_batches=1,
        scaler=None,
        global_step=0,
        train_dataloader=None,
    )
    optimizer = stage.configure_optimizers()
    tensors = [t for m in stage.models_by_role().values() for t in (*m.parameters(), *m.buffers())]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    step = Step((batch,) * settings.get("micro_batches", 1), len(batch), 1)
    dtype = settings.get("dtype")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(2):  # the states of the optimizer are there in the second
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = stage.training_step(step, 0)
            loss.backward()
            stage.on_before_optimizer_step(optimizer)
            stage.configure_gradient_clipping(optimizer, 1.0, "norm")
            optimizer.step()
            optimizer.zero_grad()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return sum(held.values()) + peak


def planned_peak(folder: str, adapter: Any, settings: dict[str, Any], batch: Batch) -> int:
    """Return the peak of a step without data."""
    checkpointing = settings.get("checkpointing")
    return trace_step(
        DPO(folder),
        batch,
        Variant(adapter=adapter, is_cached=settings.get("cached"), checkpointing=checkpointing),
        micro_batches=settings.get("micro_batches", 1),
        autocast_dtype=settings.get("dtype"),
        clip_norm=1.0,
    ).peak


def compare(model: str, setting: str) -> tuple[int, int]:
    """Return the measured and the planned peak, in bytes."""
    family, config, adapter = MODELS[model]
    batch = make_batch(8)
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_model(family, **(SIZES | config)).save_pretrained(folder)
        arguments = (folder, adapter, SETTINGS[setting], batch)
        return measured_peak(*arguments), planned_peak(*arguments)


if __name__ == "__main__":
    cases = [case.split("/") for case in sys.argv[1:]]
    print(json.dumps([compare(*case) for case in cases]), flush=True)
    os._exit(0)

"""What to do where memory runs out, in the options of the run that ran out of it."""

from typing import Any

import torch

from dpo.models.lora import AsLoaded
from dpo.training.base import Stage


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device, or a CPU, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def out_of_memory_message(error: BaseException, module: Stage, data: Any) -> str:
    """Return what ran out, with which settings, and what would need less.

    Args:
        error: The error as torch raised it.
        module: The stage that ran.
        data: Its data.
    """
    tried = data.max_tokens
    advice = [f"--data.max_tokens {tried // 2 if tried else 4096} (tokens of a forward and backward pass)"]
    if not module.gradient_checkpointing:
        advice.append("--model.gradient_checkpointing true (activations; about a third more time)")
    if isinstance(module.adapter, AsLoaded):
        advice.append("--model.adapter LoRA (gradients and optimizer states, and a second model)")
    advice.append("--model.reference Cached (the reference's weights)")
    advice.append("a lower --model.chunk_logits (the logits of a chunk)")
    reason = str(error).partition(". ")[0].splitlines()[0]
    return (
        f"--data.max_tokens: expected what memory holds, got {tried or 'null (all tokens of a step)'}, and {reason}. "
        f"What takes less, and of what: {'; '.join(advice)}."
    )

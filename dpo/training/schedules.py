"""The default optimizer, an early check of an optimizer's options, and a schedule that torch lacks as one class."""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

ADAMW_OPTIONS: dict[str, Any] = {"lr": 1e-6, "weight_decay": 0.0}
"""Options of the default optimizer, `torch.optim.AdamW`, from Python and on the command line."""


def default_optimizer(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.AdamW:
    """Return AdamW with a learning rate of 1e-6 and no weight decay."""
    return torch.optim.AdamW(parameters, **ADAMW_OPTIONS)


class Warmup(LambdaLR):
    """Linear warm-up, followed by a constant rate or by linear decay to zero.

    Args:
        optimizer: The optimizer whose learning rate is scheduled.
        warmup_steps: Optimizer steps until the full rate; the first step uses 1 / warmup_steps of it.
        total_steps: Optimizer steps until the rate is zero. None: the rate stays constant after the warm-up.

    Raises:
        ValueError: `warmup_steps` is negative, or the decay would end before the warm-up.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 150, total_steps: int | None = None) -> None:
        if warmup_steps < 0 or (total_steps is not None and total_steps <= warmup_steps):
            raise ValueError(
                f"expected 0 <= warmup_steps < total_steps, got warmup_steps {warmup_steps}, total_steps {total_steps}."
            )

        def factor(step: int) -> float:
            rising = min(1.0, (step + 1) / max(1, warmup_steps))
            if total_steps is None:
                return rising
            return min(rising, max(0.0, (total_steps - step) / (total_steps - warmup_steps)))

        super().__init__(optimizer, factor)


def validate_optimizer(optimizer: OptimizerCallable) -> OptimizerCallable:
    """Return the optimizer's constructor after trying it on one parameter, before any model or data are read.

    Raises:
        ValueError: The optimizer refuses its options.
    """
    try:
        optimizer([torch.nn.Parameter(torch.zeros(1, 1))])
    except ValueError as error:
        raise ValueError(f"--optimizer: the optimizer refuses its options: {error}.") from error
    return optimizer

"""Learning rate schedules that torch does not have in one piece, and a first look at an optimizer's options."""

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class Warmup(LambdaLR):
    """Linear warm-up, then constant, or linear decay to zero at `total_steps`.

    Args:
        optimizer: Whose learning rate is scheduled.
        warmup_steps: Optimizer steps until the full rate; the first step takes 1 / warmup_steps of it.
        total_steps: Optimizer steps until zero. None: the rate stays.

    Raises:
        ValueError: The steps are negative, or the decay would end before the warm-up.
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
    """The same, tried on one parameter: what is wrong with its options is known before anything is read.

    Raises:
        ValueError: Something is.
    """
    try:
        optimizer([torch.nn.Parameter(torch.zeros(1, 1))])
    except ValueError as error:
        raise ValueError(f"--optimizer: expected options that it takes, got another value: {error}.") from error
    return optimizer

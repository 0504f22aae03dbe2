"""Callbacks that make training fail, for processes of their own too: nothing of the tests is imported with them."""

from typing import Any

import lightning as L
import torch
from torch import Tensor


class BreakSteps(L.Callback):
    """Makes the loss of a pair of some optimizer steps NaN, in one process; the gradient stays finite."""

    def __init__(self, steps: list[int], rank: int = 0) -> None:
        self.steps, self.rank = steps, rank

    def setup(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        losses = module.losses

        def broken(batch: Any, means: Any) -> Tensor:
            breaks = trainer.training and trainer.global_step + 1 in self.steps and trainer.global_rank == self.rank
            found = losses(batch, means)
            return torch.where(torch.arange(len(found)) == 0, torch.nan, 0) + found if breaks else found

        module.losses = broken


class FailInStep(L.Callback):
    """Fails in one process in its fourth step: by an error, or by asking for more memory than there is."""

    def __init__(self, rank: int, memory: bool) -> None:
        self.rank, self.memory = rank, memory

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == 3:
            if self.memory:
                torch.empty(1 << 60)
            raise ValueError("this process alone fails")

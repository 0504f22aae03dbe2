"""A callback of a user with which training cannot be resumed exactly."""

import lightning as L
import torch


class GrowingGradients(L.Callback):
    """Multiplies gradients by the number of steps that this process has taken, which no checkpoint holds."""

    def __init__(self) -> None:
        self.steps = 0

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.steps += 1
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad *= self.steps

"""Numbers that are not finite must not reach the weights.

Takes the losses of the pairs of an optimizer step and its gradient norm; raises with the ids of the pairs that are to
blame. Knows nothing of models.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


class NonFiniteError(RuntimeError):
    """A loss or a gradient is not a finite number."""


@dataclass(frozen=True)
class StepRecord:
    """What went into the gradient of one optimizer step: its norm, and ids and losses of every micro-batch."""

    step: int
    grad_norm: Tensor
    micro_batch_losses: list[tuple[tuple[str, ...], Tensor]]


class FiniteMonitor:
    """What has gone into gradients since the last check. Only `check` waits for the device."""

    def __init__(self) -> None:
        self.micro_batch_losses: list[tuple[tuple[str, ...], Tensor]] = []
        self.step_records: list[StepRecord] = []
        self.nonfinite_flag = torch.zeros(())

    def add_losses(self, ids: tuple[str, ...], losses: Tensor) -> None:
        """Remember the losses of these pairs."""
        self.micro_batch_losses.append((ids, losses.detach()))

    def close_step(self, step: int, grad_norm: Tensor) -> Tensor:
        """End a step. 1, on the device, if anything of it is not finite, or of any step before it; else 0."""
        self.step_records.append(StepRecord(step, grad_norm, self.micro_batch_losses))
        finite = grad_norm.isfinite()
        for _, losses in self.micro_batch_losses:
            finite = finite & losses.isfinite().all()
        self.micro_batch_losses = []
        self.nonfinite_flag = torch.maximum(self.nonfinite_flag.to(finite.device), (~finite).float())
        return self.nonfinite_flag

    def raise_if_nonfinite(self) -> None:
        """Forget the steps that have ended, if all of them are finite.

        Raises:
            NonFinite: One is not; with the ids of the first.
        """
        if self.nonfinite_flag:
            raise NonFiniteError(next(message for message in map(_message, self.step_records) if message))
        self.step_records.clear()


def _message(taken: StepRecord) -> str:
    """What is wrong with a step; empty if nothing is."""
    every = [
        (row, bool(good))
        for ids, losses in taken.micro_batch_losses
        for row, good in zip(ids, losses.isfinite(), strict=True)
    ]
    bad = [row for row, good in every if not good]
    if not bad and taken.grad_norm.isfinite():
        return ""
    return (
        f"step {taken.step}: the {'loss' if bad else 'gradient'} is not finite for the pairs "
        f"{', '.join(bad or [row for row, _ in every])}. The weights are those before this step and the last "
        "checkpoint is intact. Try a smaller --optimizer.lr, --trainer.precision 32-true or bf16-mixed, or look at "
        "these rows."
    )

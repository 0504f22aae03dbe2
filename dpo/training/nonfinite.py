"""Numbers that are not finite must not reach the weights.

Takes the losses of the pairs of an optimizer step and its gradient norm; raises with the ids of the pairs that are to
blame. Knows nothing of models.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


class NonFinite(RuntimeError):
    """A loss or a gradient is not a finite number."""


@dataclass(frozen=True)
class Taken:
    """What went into the gradient of one optimizer step: its norm, and ids and losses of every micro-batch."""

    step: int
    grad_norm: Tensor
    parts: list[tuple[tuple[str, ...], Tensor]]


class Watch:
    """What has gone into gradients since the last check. Only `check` waits for the device."""

    def __init__(self) -> None:
        self.parts: list[tuple[tuple[str, ...], Tensor]] = []
        self.taken: list[Taken] = []
        self.broken = torch.zeros(())

    def add(self, ids: tuple[str, ...], losses: Tensor) -> None:
        """Remember the losses of these pairs."""
        self.parts.append((ids, losses.detach()))

    def close(self, step: int, grad_norm: Tensor) -> Tensor:
        """End a step. 1, on the device, if anything of it is not finite, or of any step before it; else 0."""
        self.taken.append(Taken(step, grad_norm, self.parts))
        finite = grad_norm.isfinite()
        for _, losses in self.parts:
            finite = finite & losses.isfinite().all()
        self.parts = []
        self.broken = torch.maximum(self.broken.to(finite.device), (~finite).float())
        return self.broken

    def check(self) -> None:
        """Forget the steps that have ended, if all of them are finite.

        Raises:
            NonFinite: One is not; with the ids of the first.
        """
        if self.broken:
            raise NonFinite(next(message for message in map(_message, self.taken) if message))
        self.taken.clear()


def _message(taken: Taken) -> str:
    """What is wrong with a step; empty if nothing is."""
    every = [(row, bool(good)) for ids, losses in taken.parts for row, good in zip(ids, losses.isfinite(), strict=True)]
    bad = [row for row, good in every if not good]
    if not bad and taken.grad_norm.isfinite():
        return ""
    return (
        f"step {taken.step}: the {'loss' if bad else 'gradient'} is not finite for the pairs "
        f"{', '.join(bad or [row for row, _ in every])}. The weights are those before this step and the last "
        "checkpoint is intact. Try a smaller --optimizer.lr, --trainer.precision 32-true or bf16-mixed, or look at "
        "these rows."
    )

"""Detection of losses and gradients that are not finite, before they reach the weights.

The check runs on the device; the host waits for its result only at logged steps and checkpoints. The error names the
pairs whose loss was not finite.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpo.models.sharding import whole_tensor


class NonFiniteError(RuntimeError):
    """A loss or a gradient is not a finite number."""


@dataclass(frozen=True)
class StepRecord:
    """What went into the gradient of one optimizer step.

    Attributes:
        step: Number of the optimizer step, from 1.
        grad_norm: Norm of its gradient.
        micro_batch_losses: Ids and losses of the pairs of every micro-batch.
    """

    step: int
    grad_norm: Tensor
    micro_batch_losses: list[tuple[tuple[str, ...], Tensor]]


class FiniteMonitor:
    """Losses and gradient norms since the last check; only `raise_if_nonfinite` waits for the device.

    Attributes:
        micro_batch_losses: Ids and losses of the pairs of the current step.
        step_records: Optimizer steps that have ended since the last check.
        nonfinite_flag: 1, on the device, once a step had a value that is not finite; else 0.
    """

    def __init__(self) -> None:
        self.micro_batch_losses: list[tuple[tuple[str, ...], Tensor]] = []
        self.step_records: list[StepRecord] = []
        self.nonfinite_flag = torch.zeros(())

    def add_losses(self, ids: tuple[str, ...], losses: Tensor) -> None:
        """Add the losses of a micro-batch to the current step."""
        self.micro_batch_losses.append((ids, losses.detach()))

    def close_step(self, step: int, grad_norm: Tensor) -> Tensor:
        """End the current step.

        Args:
            step: Number of the optimizer step, from 1.
            grad_norm: Norm of its gradient.

        Returns:
            1, on the device, if this or an earlier step has a value that is not finite; else 0.
        """
        self.step_records.append(StepRecord(step, grad_norm, self.micro_batch_losses))
        finite = grad_norm.isfinite()
        for _, losses in self.micro_batch_losses:
            finite = finite & losses.isfinite().all()
        self.micro_batch_losses = []
        self.nonfinite_flag = torch.maximum(self.nonfinite_flag.to(finite.device), (~finite).float())
        return self.nonfinite_flag

    def raise_if_nonfinite(self, last_step: int | None = None) -> None:
        """Wait for the device, and discard the steps that have ended if all of their values are finite.

        Args:
            last_step: The last step that counts; a later one was not taken. None: all steps count.

        Raises:
            NonFiniteError: A value is not finite; the message names the first such step and its pairs.
        """
        if not self.nonfinite_flag:
            self.step_records.clear()
            return
        taken = [record for record in self.step_records if last_step is None or record.step <= last_step]
        if message := next(filter(None, map(_describe_nonfinite, taken)), ""):
            raise NonFiniteError(message)


@torch.no_grad()
def require_finite_weights(model: nn.Module, step: int) -> None:
    """Wait for the device, and check the weights that train.

    Raises:
        NonFiniteError: A weight is not finite.
    """
    finite = {name: whole_tensor(p.isfinite().all()) for name, p in model.named_parameters() if p.requires_grad}
    if finite and not torch.stack(list(finite.values())).all():
        broken = [name for name, is_finite in finite.items() if not is_finite]
        raise NonFiniteError(
            f"after step {step} the weights are not finite ({', '.join(broken[:3])}): nothing is saved. Try "
            "a smaller --optimizer.lr, and resume from the last checkpoint, if there is one, or start again."
        )


def _describe_nonfinite(record: StepRecord) -> str:
    """Return what is not finite in a step, and for which pairs; empty if everything is finite."""
    ids = [pair_id for batch_ids, _ in record.micro_batch_losses for pair_id in batch_ids]
    finite = [is_finite for _, losses in record.micro_batch_losses for is_finite in losses.isfinite().tolist()]
    bad_ids = [pair_id for pair_id, is_finite in zip(ids, finite, strict=True) if not is_finite]
    if not bad_ids and record.grad_norm.isfinite():
        return ""
    return (
        f"step {record.step}: the {'loss' if bad_ids else 'gradient'} is not finite for the pairs "
        f"{', '.join(bad_ids or ids)}. The weights are still those from before this step. "
        "Try a smaller --optimizer.lr, --trainer.precision 32-true or bf16-mixed, or check these rows."
    )

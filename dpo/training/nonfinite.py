"""Steps whose loss or gradient is not finite: none reaches the weights; each stops the run or is left out.

The check runs on the device, and its result is that of all processes; the host waits for it only at logged steps and
checkpoints. Error and warning name the pairs whose loss was not finite.

A step that is left out changes neither the weights nor the state of the optimizer. It is counted all the same: its
pairs are used up, the schedule advances, and the position in the data stays a function of the number of steps.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, distributed, nn

from dpo.models.sharding import whole_tensor

OnNonFinite = Literal["stop", "skip"]
MAX_SKIPPED_IN_ROW = 10
"""Steps that are left out one after the other; the next one stops the run."""


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

    def ids(self) -> list[str]:
        """Return the ids of all pairs of this process."""
        return [pair_id for ids, _ in self.micro_batch_losses for pair_id in ids]

    def bad_ids(self) -> list[str]:
        """Return the ids of the pairs of this process whose loss is not finite."""
        finite = [is_finite for _, losses in self.micro_batch_losses for is_finite in losses.isfinite().tolist()]
        return [pair_id for pair_id, is_finite in zip(self.ids(), finite, strict=True) if not is_finite]


class FiniteMonitor:
    """Losses and gradient norms since the last check; only `raise_if_nonfinite` waits for the device.

    Attributes:
        on_nonfinite: Whether a step that is not finite stops the run or is left out.
        micro_batch_losses: Ids and losses of the pairs of the current step.
        step_records: Optimizer steps that have ended since the last check.
        counts: On the device: steps left out one after the other up to the last one, and steps left out in all.
        checked_counts: The same as of the last check that has raised no error.
    """

    def __init__(self, on_nonfinite: OnNonFinite = "stop") -> None:
        """Start with nothing left out.

        Raises:
            ValueError: `on_nonfinite` is neither ``stop`` nor ``skip``.
        """
        if on_nonfinite not in get_args(OnNonFinite):
            raise ValueError(f"--model.on_nonfinite: expected stop or skip, got {on_nonfinite!r}.")
        self.on_nonfinite = on_nonfinite
        self.micro_batch_losses: list[tuple[tuple[str, ...], Tensor]] = []
        self.step_records: list[StepRecord] = []
        self.counts = torch.zeros(2)
        self.checked_counts = [0.0, 0.0]

    @property
    def _max_in_row(self) -> int:
        return MAX_SKIPPED_IN_ROW if self.on_nonfinite == "skip" else 0

    def add_losses(self, ids: tuple[str, ...], losses: Tensor) -> None:
        """Add the losses of a micro-batch to the current step."""
        self.micro_batch_losses.append((ids, losses.detach()))

    def close_step(self, step: int, grad_norm: Tensor) -> Tensor:
        """End the current step, in all processes.

        Args:
            step: Number of the optimizer step, from 1.
            grad_norm: Norm of its gradient.

        Returns:
            1, on the device, if the step must not be taken: it has a value that is not finite in one of the processes,
            or earlier ones had and the run is to stop. Otherwise 0.
        """
        self.step_records.append(StepRecord(step, grad_norm, self.micro_batch_losses))
        finite = grad_norm.isfinite()
        for _, losses in self.micro_batch_losses:
            finite = finite & losses.isfinite().all()
        self.micro_batch_losses = []
        nonfinite = (~finite).float()
        if _has_processes():
            distributed.all_reduce(nonfinite, distributed.ReduceOp.MAX)
        in_row, in_all = self.counts.to(nonfinite.device, non_blocking=True)
        nonfinite = torch.maximum(nonfinite, (in_row > self._max_in_row).float())
        self.counts = torch.stack([(in_row + 1) * nonfinite, in_all + nonfinite])
        return nonfinite

    def raise_if_nonfinite(self, last_step: int | None = None) -> bool:
        """Wait for the device, and discard the steps that have ended; warn of those that are left out.

        All processes call this after the same steps.

        Args:
            last_step: The last step that counts; a later one was not taken. None: all steps count.

        Returns:
            Whether the last step that has ended is left out.

        Raises:
            NonFiniteError: A value is not finite, and such steps stop the run or there were too many in a row; the
                message names the first such step since the last check and its pairs.
        """
        counts = self.counts.tolist()
        if counts[1] > self.checked_counts[1]:
            messages = _describe_nonfinite(self.step_records, last_step)
            if counts[0] > self._max_in_row:
                if messages:
                    raise NonFiniteError(f"{messages[0]} {self._advice()}")
                return False
            for message in messages:
                rank_zero_warn(f"{message} The step is left out (--model.on_nonfinite skip).")
        self.step_records.clear()
        self.checked_counts = counts
        return bool(counts[0] > 0)

    def _advice(self) -> str:
        advice = (
            "The weights are still those from before this step. Try a smaller --optimizer.lr, --trainer.precision "
            "32-true or bf16-mixed, or check these rows: --data.exclude leaves rows out, also when a run is resumed"
        )
        if self.on_nonfinite == "skip":
            return f"More than {MAX_SKIPPED_IN_ROW} steps in a row were not finite. {advice}."
        return f"{advice}, and --model.on_nonfinite skip leaves out steps like this one."

    def metrics(self) -> dict[str, float]:
        """Return the number of steps left out so far, as of the last check, if steps are left out."""
        return {"skipped_steps": self.checked_counts[1]} if self.on_nonfinite == "skip" else {}

    def report_skipped(self) -> None:
        """Say how many steps of the run were left out, if there were any."""
        if count := int(self.checked_counts[1]):
            rank_zero_info(f"Left out: {count} of the steps, whose loss or gradient was not finite (see the warnings).")

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of the last check, for the checkpoint."""
        return {"counts": self.checked_counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the counts from a checkpoint, whose run may have been allowed to leave out more."""
        in_row, in_all = state["counts"]
        self.checked_counts = [min(in_row, float(self._max_in_row)), in_all]
        self.counts = torch.tensor(self.checked_counts)


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


def _describe_nonfinite(records: list[StepRecord], last_step: int | None) -> list[str]:
    """Return, for every step up to the last one that counts, what is not finite in it and for which pairs.

    All processes call this together: each has pairs of its own.
    """
    taken = [record for record in records if last_step is None or record.step <= last_step]
    ours = [(record.bad_ids(), record.ids(), bool(record.grad_norm.isfinite())) for record in taken]
    of_all = [ours]
    if _has_processes():
        of_all = of_all * distributed.get_world_size()
        distributed.all_gather_object(of_all, ours)
    messages = []
    for record, parts in zip(taken, zip(*of_all, strict=True), strict=True):
        bad_ids, ids = ([pair_id for part in parts for pair_id in part[side]] for side in (0, 1))
        if bad_ids or not all(part[2] for part in parts):
            cause = "loss" if bad_ids else "gradient"
            named = ", ".join(bad_ids or ids)
            messages.append(f"step {record.step}: the {cause} is not finite for the pairs {named}.")
    return messages


def _has_processes() -> bool:
    return distributed.is_available() and distributed.is_initialized()

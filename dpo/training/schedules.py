"""The default optimizer, an early check of an optimizer's options, and a schedule that torch lacks as one class."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

ADAMW_OPTIONS: dict[str, Any] = {"lr": 1e-6, "weight_decay": 0.0}
"""Options of the default optimizer, `torch.optim.AdamW`, from Python and on the command line."""

WARMUP_STEPS = 150  # of `Warmup`, in optimizer steps, where nothing is given
# What a learning rate and a weight decay must be; torch takes others, with which nothing is learned.
_OPTIMIZER_LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    "lr": (lambda rate: 0 < rate < math.inf, "a finite number above 0"),
    "weight_decay": (lambda decay: 0 <= decay < math.inf, "a finite number of at least 0"),
}


def default_optimizer(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.AdamW:
    """Return AdamW with a learning rate of 1e-6 and no weight decay."""
    return torch.optim.AdamW(parameters, **ADAMW_OPTIONS)


def suit_device(optimizer: Optimizer, *, gradients_scaled: bool) -> Optimizer:
    """Return the optimizer fused where its parameters are on CUDA and nobody has chosen otherwise.

    A fused one steps in few kernels, and skips a step that is not finite without the host waiting for it. On a CPU
    torch's choice stays, with which results are those of earlier versions to the bit.

    Args:
        optimizer: The optimizer as its options made it.
        gradients_scaled: Gradients of float16 are scaled. They have to be divided before they are clipped, so that a
            fused optimizer must leave that to the scaler.
    """
    groups = optimizer.param_groups
    undecided = all(group.get("fused", False) is None and not group.get("foreach") for group in groups)
    if undecided and not gradients_scaled and all(p.is_cuda for group in groups for p in group["params"]):
        options = [{name: value for name, value in group.items() if name != "fused"} for group in groups]
        return type(optimizer)(options, fused=True)  # type: ignore[call-arg]
    if gradients_scaled:
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # torch's mark of a fused one
    return optimizer


class Warmup(LambdaLR):
    """Linear warm-up, followed by a constant rate or by linear decay to zero.

    Args:
        optimizer: The optimizer whose learning rate is scheduled.
        warmup_steps: Optimizer steps until the full rate; the first step uses 1 / warmup_steps of it. None: 150, unless
            `warmup_ratio` is given.
        total_steps: Optimizer steps until the rate is zero. None: the rate stays constant after the warm-up.
        warmup_ratio: Share of the run's optimizer steps, from 0 to 1, instead of `warmup_steps`; rounded up.

    Raises:
        ValueError: `warmup_steps` is negative, the decay would end before the warm-up, `warmup_ratio` is no share, or
            both are given.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int | None = None,
        total_steps: int | None = None,
        warmup_ratio: float | None = None,
    ) -> None:
        if warmup_ratio is not None and warmup_steps is not None:
            raise ValueError(
                "--lr_scheduler.warmup_ratio: expected either warmup_ratio or warmup_steps, got "
                f"{warmup_ratio} and {warmup_steps}. Set one of them to null."
            )
        if warmup_ratio is not None and not 0 <= warmup_ratio <= 1:
            raise ValueError(f"--lr_scheduler.warmup_ratio: expected a share from 0 to 1, got {warmup_ratio}.")
        self.warmup_ratio = warmup_ratio
        self.total_steps = total_steps
        self.warmup_steps = WARMUP_STEPS if warmup_steps is None else warmup_steps
        if warmup_ratio is None:
            self._check_order()
        super().__init__(optimizer, lambda step: self._factor(step))

    def _check_order(self) -> None:
        if self.warmup_steps < 0 or (self.total_steps is not None and self.total_steps <= self.warmup_steps):
            raise ValueError(
                f"expected 0 <= warmup_steps < total_steps, got warmup_steps {self.warmup_steps}, total_steps "
                f"{self.total_steps}."
            )

    def _factor(self, step: int) -> float:
        rising = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.total_steps is None:
            return rising
        return min(rising, max(0.0, (self.total_steps - step) / (self.total_steps - self.warmup_steps)))

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the schedule; its options come from whoever resumes."""
        options = ("warmup_steps", "total_steps", "warmup_ratio")
        return {name: value for name, value in super().state_dict().items() if name not in options}

    def set_run_steps(self, run_steps: float) -> None:
        """Set the rate for a run whose length is known now, and warn if the run ends before its warm-up.

        Args:
            run_steps: Optimizer steps of the run; infinite if only its time is limited.

        Raises:
            ValueError: The warm-up is a share of a run without a number of steps, or as long as the decay.
        """
        if self.warmup_ratio is not None:
            if math.isinf(run_steps):
                raise ValueError(
                    "--lr_scheduler.warmup_ratio: expected a run of a known number of steps, got one that only its "
                    "time limits. Give --trainer.max_steps or --lr_scheduler.warmup_steps."
                )
            self.warmup_steps = math.ceil(self.warmup_ratio * run_steps)
            self._check_order()
            for group, rate in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
                group["lr"] = rate * self._factor(self.last_epoch)
            self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        if self.warmup_steps > run_steps:
            reached = self.base_lrs[0] * self._factor(int(run_steps) - 1)
            rank_zero_info(
                f"Warning: the warm-up of {self.warmup_steps} steps is longer than the run of {int(run_steps)}: the "
                f"learning rate ends at {reached:.3g} and never reaches {self.base_lrs[0]:.3g}. Give fewer "
                "--lr_scheduler.warmup_steps, or --lr_scheduler.warmup_ratio 0.1."
            )


def validate_optimizer(optimizer: OptimizerCallable) -> OptimizerCallable:
    """Return the optimizer's constructor after trying it on one parameter, before any model or data are read.

    Raises:
        TypeError: It is no constructor.
        ValueError: The optimizer refuses its options, or would not train with them.
    """
    if not callable(optimizer):
        raise TypeError(
            "optimizer: expected what makes one from parameters, such as functools.partial(torch.optim.AdamW, "
            f"lr=1e-5), got {optimizer!r}."
        )
    try:
        groups = optimizer([torch.nn.Parameter(torch.zeros(1, 1))]).param_groups
    except ValueError as error:
        raise ValueError(_plain_refusal(str(error))) from error
    for option, (holds, expected) in _OPTIMIZER_LIMITS.items():
        for value in (group[option] for group in groups if option in group):
            if not holds(float(value)):
                raise ValueError(f"--optimizer.{option}: expected {expected}, got {float(value):g}.")
    return optimizer


def validate_schedule(
    optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None
) -> LRSchedulerCallable | None:
    """Return the schedule's constructor after trying it on an optimizer of one parameter.

    Raises:
        ValueError: The schedule refuses its options.
    """
    if lr_scheduler is not None:
        try:
            lr_scheduler(optimizer([torch.nn.Parameter(torch.zeros(1, 1))]))
        except ValueError as error:
            prefix = "" if str(error).startswith("--") else "--lr_scheduler: "
            raise ValueError(f"{prefix}{error}") from error
    return lr_scheduler


def _plain_refusal(message: str) -> str:
    """Return torch's refusal in the words of the command line."""
    for name, option in (("learning rate", "lr"), ("weight_decay value", "weight_decay")):
        if match := re.fullmatch(f"Invalid {name}: (.*)", message):
            return f"--optimizer.{option}: expected {_OPTIMIZER_LIMITS[option][1]}, got {match[1]}."
    return f"--optimizer: the optimizer refuses its options: {message}."

"""What a resumed run takes from its checkpoint, what it takes from its own options, and what must be the same.

With other data or another batch size, the checkpoint's position in the data would mean other pairs; with another loss
the run would be half of each. The length of training, what is logged, how a step is split into micro-batches, and the
optimizer's options may change, and those of the resumed run count.
"""

import os
import warnings
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info

from dpo.data.datamodule import PairData

FixedOptions = dict[str, str | int]
"""Options that a resumed run must have in common with its checkpoint, by their name on the command line."""


def trainer_fixed_options(trainer: L.Trainer) -> FixedOptions:
    """Return the options of trainer and data that decide which pairs come, and in which order."""
    options: FixedOptions = {
        "--seed_everything": os.environ.get("PL_GLOBAL_SEED", ""),  # set by Lightning, if it is set at all
        "--trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
    }
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, PairData):
        options |= {
            "--data.batch_size": data.batch_size,
            "--data.shuffle": data.shuffle,
            "--data.seed": data.seed,
            "--data: training pairs with SHA-256": data.training_sha256[:16],
        }
    return options


def excluded_pairs(trainer: L.Trainer) -> list[str]:
    """Return the ids of the pairs that the data leave out."""
    data = getattr(trainer, "datamodule", None)
    return sorted(data.exclusion.ids) if isinstance(data, PairData) else []


def report_exclusion(checkpoint: Mapping[str, Any], current: list[str]) -> None:
    """Say that a run goes on with other pairs left out, which no interruption alone would change."""
    saved = checkpoint.get("excluded_pairs", [])
    changes = (("left out now", set(current) - set(saved)), ("no longer left out", set(saved) - set(current)))
    if changed := [f"{', '.join(sorted(ids))} {state}" for state, ids in changes if ids]:
        rank_zero_info(
            f"--data.exclude: {'; '.join(changed)}. From step {checkpoint['global_step'] + 1} on, this is another run "
            "than the uninterrupted one."
        )


def check_fixed_options(checkpoint: Mapping[str, Any], current: FixedOptions) -> None:
    """Compare the options that a checkpoint was trained with to the current ones, where both are known.

    Raises:
        ValueError: Some of them differ.
    """
    saved = checkpoint.get("fixed_options", {})
    changed = [
        f"{name} {saved[name]} (now {new})"
        for name, new in current.items()
        if name in saved and saved[name] != new and "" not in (saved[name], new)
    ]
    if changed:
        raise ValueError(
            f"the checkpoint was trained with other options: expected {', '.join(changed)}. Resume with the options "
            "that the run began with (config.yaml), or start a new run with --model.policy set to that run's export."
        )


def check_optimizer_class(checkpoint: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Compare the class of the optimizer with that of the checkpoint, before Lightning restores its state.

    Raises:
        ValueError: The state in the checkpoint belongs to another optimizer.
    """
    saved, name = checkpoint["optimizer"], type(optimizer).__name__
    if saved != name:
        raise ValueError(
            f"the checkpoint holds the state of {saved}: expected --optimizer {saved}, got {name}. "
            "To change the optimizer, start a new run with --model.policy set to the export of this one."
        )


def apply_optimizer_options(trainer: L.Trainer, configured: Any) -> None:
    """Replace the restored options of optimizer and schedule, and advance the new schedule to this step.

    Lightning restores the options (learning rate, weight decay, ...) along with the optimizer's state, so that changed
    ones would be ignored. With unchanged options, a resumed run equals an uninterrupted one.

    Args:
        trainer: The trainer, with the restored optimizer.
        configured: What the module's `configure_optimizers` returns.
    """
    if trainer.lr_scheduler_configs:
        schedule = configured["lr_scheduler"]["scheduler"]
        configured = configured["optimizer"]
        with warnings.catch_warnings():
            # The new optimizer takes no steps; only the learning rates of its schedule are of use.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for _ in range(trainer.global_step):
                schedule.step()
        trainer.lr_scheduler_configs[0].scheduler.load_state_dict(schedule.state_dict())
    (optimizer,) = trainer.optimizers
    for group, new_group in zip(optimizer.param_groups, configured.param_groups, strict=True):
        options = {name: value for name, value in new_group.items() if name != "params"}
        for name, value in options.items():
            if name in group and group[name] != value:
                rank_zero_info(f"Optimizer: {name} is {value}, in the checkpoint {group[name]}.")
        group.update(options)
        _move_step_counts(optimizer, group)


def _move_step_counts(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """Move step counts to the device for a fused optimizer; the checkpoint may be of one that counts on the host."""
    for parameter in group["params"] if group.get("fused") else ():
        state = optimizer.state.get(parameter, {})
        if "step" in state:
            state["step"] = state["step"].to(parameter.device, torch.float32)

"""The options of optimizer and schedule of a run that goes on from a checkpoint.

Takes what Lightning's hooks give. Knows nothing of losses.
"""

import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info


class OptimizerOverrides(L.Callback):
    """Goes on from a checkpoint with the optimizer's options and the schedule of the command line, not with saved ones.

    What is saved of them is what they had been. Where they are the same, a resumed run is the uninterrupted one.
    """

    saved_optimizer = ""  # optimizer of the checkpoint that training goes on from

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember which optimizer the saved state is of."""
        checkpoint["optimizer"] = type(trainer.optimizers[0]).__name__

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look it up."""
        self.saved_optimizer = checkpoint["optimizer"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before the state is restored.

        Raises:
            ValueError: It is of another optimizer.
        """
        name = type(trainer.optimizers[0]).__name__
        if self.saved_optimizer not in ("", name):
            raise ValueError(
                f"the checkpoint holds the state of {self.saved_optimizer}: expected --optimizer {self.saved_optimizer}, got {name}. "
                "To change it, begin a run with --model.policy at the export of this one."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make optimizer and schedule anew, go as many steps along the schedule, and take over all but the state."""
        if not self.saved_optimizer:
            return
        (optimizer,), configs = trainer.optimizers, trainer.lr_scheduler_configs
        made: Any = pl_module.configure_optimizers()
        if configs:
            schedule, made = made["lr_scheduler"]["scheduler"], made["optimizer"]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # there are no steps to take
                for _ in range(trainer.global_step):
                    schedule.step()
            configs[0].scheduler.load_state_dict(schedule.state_dict())
        for group, chosen in zip(optimizer.param_groups, made.param_groups, strict=True):
            options = {name: value for name, value in chosen.items() if name != "params"}
            changed = [name for name, value in options.items() if name in group and group[name] != value]
            for name in changed:
                rank_zero_info(f"Optimizer: {name} is {options[name]}, in the checkpoint {group[name]}.")
            group.update(options)
            _count_on_device(optimizer, group)


def _count_on_device(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """A fused optimizer counts its steps on the device, where one that was not has counted on the host."""
    for parameter in group["params"] if group.get("fused") else ():
        state = optimizer.state.get(parameter, {})
        if "step" in state:
            state["step"] = state["step"].to(parameter.device, torch.float32)

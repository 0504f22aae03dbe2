"""The callback that gives a resumed run the optimizer options and schedule of its command line."""

import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info


class OptimizerOverrides(L.Callback):
    """Resumes with the optimizer options and the schedule of the command line instead of the saved ones.

    Lightning restores the options (learning rate, weight decay, ...) along with the optimizer's state, so that changed
    ones would be ignored. With unchanged options, a resumed run equals an uninterrupted one.
    """

    saved_optimizer = ""  # class name of the optimizer in the checkpoint; empty in a run that does not resume

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the name of the optimizer that the state belongs to."""
        checkpoint["optimizer"] = type(trainer.optimizers[0]).__name__

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read the name of the optimizer that the state belongs to."""
        self.saved_optimizer = checkpoint["optimizer"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the optimizers before Lightning restores the state.

        Raises:
            ValueError: The state in the checkpoint belongs to another optimizer.
        """
        name = type(trainer.optimizers[0]).__name__
        if self.saved_optimizer not in ("", name):
            raise ValueError(
                f"the checkpoint holds the state of {self.saved_optimizer}: expected --optimizer "
                f"{self.saved_optimizer}, got {name}. "
                "To change the optimizer, start a new run with --model.policy set to the export of this one."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Overwrite the restored options with those of a new optimizer, and advance a new schedule to this step."""
        if not self.saved_optimizer:
            return
        configured: Any = pl_module.configure_optimizers()
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

"""The callback that decides when ``last.ckpt`` and ``best.ckpt`` are saved."""

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from dpo.runs.folder import Run


class LastAndBest(Checkpoint):
    """Saves last.ckpt after every epoch and validation and at the end, best.ckpt at the lowest validation loss."""

    def __init__(self, run: Run) -> None:
        """Save into the checkpoint folder of `run`."""
        self.run = run
        self.best_loss = math.inf

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save last.ckpt, and best.ckpt if the validation loss is the lowest so far."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        loss = trainer.callback_metrics["val/loss"].item()
        if loss < self.best_loss:
            self.best_loss = loss
            self._save(trainer, "best")
        self._save(trainer, "last")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save last.ckpt after the last batch of an epoch or run, before the validation that may follow."""
        if trainer.is_last_batch or trainer.should_stop or trainer.global_step == trainer.max_steps:
            self._save(trainer, "last")

    def _save(self, trainer: L.Trainer, name: str) -> None:
        trainer.save_checkpoint(self.run.checkpoint_folder / f"{name}.ckpt", weights_only=False)

    def state_dict(self) -> dict[str, Any]:
        """Return the lowest validation loss so far, for the checkpoint."""
        return {"best": self.best_loss}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the lowest validation loss from a checkpoint."""
        self.best_loss = state_dict["best"]

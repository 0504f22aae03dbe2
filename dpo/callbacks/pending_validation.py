"""The callback that makes up a validation which was due when a run ended."""

from collections.abc import Mapping
from typing import Any

import lightning as L

from dpo.data.sampler import Step


class PendingValidation(L.Callback):
    """Validates on resuming, before the next step, if the run was stopped or killed before it had validated.

    It comes before the callbacks that stop a run: a stop at the user's request makes no validation due.

    Attributes:
        is_due: A validation follows the last step by the run's own options, and has not ended yet.
    """

    is_due = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Step, batch_idx: int
    ) -> None:
        """Find out whether Lightning validates after this batch; resuming repeats batches of an unfinished step."""
        is_step_end = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        self.is_due = is_step_end and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The validation has ended, before the checkpoint that says so."""
        self.is_due &= trainer.sanity_checking

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Step, batch_idx: int
    ) -> None:
        """Validate as Lightning's training loop does between two batches; all else is restored by now."""
        if self.is_due and trainer.enable_validation:
            connector = trainer._logger_connector
            is_first = connector._first_loop_iter
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True
            connector.on_batch_start(batch)
            connector._first_loop_iter = is_first

    def state_dict(self) -> dict[str, Any]:
        """Return whether a validation is due, for the checkpoint."""
        return {"is_due": self.is_due}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over from a checkpoint whether a validation is due."""
        self.is_due = state_dict["is_due"]

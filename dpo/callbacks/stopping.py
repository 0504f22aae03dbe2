"""How a run is stopped in order, and that it is validated where it ends.

Takes signals and what Lightning's hooks give.
"""

import signal
from types import FrameType

import lightning as L

from dpo.data.sampler import Step


class GracefulStop(L.Callback):
    """Ends a run in order on SIGINT and SIGTERM: the step is finished, then checkpoint, table and export as always."""

    def __init__(self) -> None:
        """Nothing has been asked yet."""
        self.signal_number = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over both signals from Lightning, which gives them back when it tears down; the second ends at once."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number:
            raise KeyboardInterrupt
        self.signal_number = number
        print(
            "\nStopping after this step: checkpoint, table and export follow. Once more ends at once.",
            flush=True,
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Step, batch_idx: int
    ) -> None:
        """At the end of an optimizer step, stop all devices when one was asked."""
        whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if whole and trainer.strategy.reduce_boolean_decision(bool(self.signal_number), all=False):
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # whoever sends a signal may not wait for a validation

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal."""
        return 128 + self.signal_number if self.signal_number else 0


class FinalValidation(L.Callback):
    """Validates where a run ends by its number of steps within an epoch; ends of epochs do by themselves."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Step, batch_idx: int
    ) -> None:
        """Let Lightning stop, which validates then, unless it validates here anyway."""
        due = trainer.is_last_batch or (batch_idx + 1) % (trainer.val_check_batch or 1) == 0
        trainer.should_stop |= trainer.global_step == trainer.max_steps and not due

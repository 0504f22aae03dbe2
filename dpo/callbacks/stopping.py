"""Callbacks for the end of a run: a graceful stop on signals, and a validation at the last step."""

import signal
from types import FrameType

import lightning as L

from dpo.callbacks.agreement import agreement_of
from dpo.data.sampler import Step

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class GracefulStop(L.Callback):
    """Stops training on a signal after the current optimizer step.

    SIGINT and SIGTERM, and the SIGUSR1 and SIGUSR2 by which schedulers announce the end of a job. The checkpoint, the
    table of results and the export are written as at any other end of a run.
    """

    def __init__(self) -> None:
        """Start without a signal."""
        self.signal_number = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replace Lightning's handlers; Lightning restores the original ones at teardown."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle_signal)
        agreement_of(trainer).numbers["signal"] = lambda: self.signal_number

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number:
            raise KeyboardInterrupt
        self.signal_number = number
        print(
            "\nStopping after this step; then the checkpoint, the results and the export are written. "
            "A second signal stops at once.",
            flush=True,
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Step, batch_idx: int
    ) -> None:
        """At the end of an optimizer step, stop all processes if one of them got a signal."""
        is_step_end = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if is_step_end and (number := agreement_of(trainer).largest(trainer, "signal")):
            self.signal_number = int(number)  # every process ends with the exit code of whoever was signalled
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # whoever sent the signal may kill the process before a validation ends

    @property
    def exit_code(self) -> int:
        """Exit code of the process: 128 + the signal's number, or 0 without a signal."""
        return 128 + self.signal_number if self.signal_number else 0


class FinalValidation(L.Callback):
    """Validates at the last step of a run that `max_steps` ends within an epoch.

    Lightning validates at the end of an epoch, or after a callback's stop, but not where `max_steps` is reached.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Step, batch_idx: int
    ) -> None:
        """At the last step, ask Lightning to stop, unless it validates after this batch anyway."""
        validates_here = trainer.is_last_batch or (batch_idx + 1) % (trainer.val_check_batch or 1) == 0
        trainer.should_stop |= trainer.global_step == trainer.max_steps and not validates_here

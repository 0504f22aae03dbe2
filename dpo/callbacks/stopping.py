"""Callbacks for the end of a run: a graceful stop on signals, and a validation at the last step."""

import lightning as L

from dpo.callbacks.agreement import agreement_of
from dpo.data.sampler import Step
from dpo.runs.signals import RUN_SIGNALS, StopSignals


class GracefulStop(L.Callback):
    """Stops training on a signal after the current optimizer step.

    SIGINT and SIGTERM, and the SIGUSR1 and SIGUSR2 by which schedulers announce the end of a job. The checkpoint, the
    table of results and the export are written as at any other end of a run.
    """

    def __init__(self, signals: StopSignals = RUN_SIGNALS) -> None:
        """Ask `signals` whether one was received, and tell it when a step can be finished first."""
        self.signals = signals

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Step, batch_idx: int
    ) -> None:
        """Finish steps, but not the first, which has nothing to save before it and may compile for minutes."""
        self.signals.finishes_step = trainer.global_step > self.first_step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember where training starts; let all processes learn of a signal to one of them."""
        self.first_step = trainer.global_step
        agreement_of(trainer).numbers["signal"] = lambda: self.signals.number

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End at once from here on: the last step is saved before a validation, and the next run makes it up."""
        self.signals.finishes_step = False

    def on_validation_batch_start(self, *_: object) -> None:
        """End if a signal came too late for the end of the last step."""
        self.signals.raise_if_stopped()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End at once from here on: what is written next replaces the old only when it is complete."""
        self.signals.finishes_step = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Step, batch_idx: int
    ) -> None:
        """At the end of an optimizer step, stop all processes if one of them got a signal."""
        is_step_end = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        self.signals.finishes_step |= is_step_end
        if is_step_end and (number := agreement_of(trainer).largest(trainer, "signal")):
            self.signals.number = int(number)  # every process ends with the exit code of whoever was signalled
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # whoever sent the signal may kill the process before a validation ends


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


class StopAfterStep(L.Callback):
    """Stops training at the end of an optimizer step, as a signal during that step would, in every process."""

    def __init__(self, step: int) -> None:
        """Stop after this many optimizer steps of the run."""
        self.step = step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Step, batch_idx: int
    ) -> None:
        """At the end of the step, end the run without the validation that may be due."""
        if trainer.global_step == self.step and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            trainer.should_stop = True
            trainer.limit_val_batches = 0

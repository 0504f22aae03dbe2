"""The callback that logs training speed and the time spent waiting for data."""

import time
from typing import Any

import lightning as L

from dpo.data.datamodule import PairData
from dpo.data.sampler import Step
from dpo.training.base import is_logged_step


class ThroughputLogger(L.Callback):
    """Logs tokens per second, seconds per optimizer step and the share of time spent waiting for data.

    Each value is taken over the window since the last logged step. Validations do not count, nor does what follows one
    until training goes on: samples and checkpoints.
    """

    def __init__(self, data: PairData) -> None:
        """Measure the waiting time of the training loader of `data`."""
        self.data = data
        self.paused_at: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the first window."""
        self.restart_window()

    def restart_window(self) -> None:
        """Reset the counts and the clock."""
        self.tokens = self.batches = 0
        self.waited_before = self.data.train_loader.wait_seconds
        self.started_at = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Step, batch_idx: int
    ) -> None:
        """Count the batch; at a logged step, log the window and begin the next one."""
        self.tokens += sum(len(micro_batch.tokens) for micro_batch in batch.micro_batches) * trainer.world_size
        self.batches += 1
        if is_logged_step(trainer, batch_idx):
            seconds = time.perf_counter() - self.started_at
            values = {
                "train/tokens_per_second": self.tokens / seconds,
                "train/time/step": seconds / self.batches * trainer.accumulate_grad_batches,
                "train/time/data": (self.data.train_loader.wait_seconds - self.waited_before) / seconds,
            }
            pl_module.log_dict(values, logger=False)
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)
            self.restart_window()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pause the clock until the next training batch."""
        self.paused_at = time.perf_counter()

    def on_train_batch_start(self, *_: Any) -> None:
        """Resume the clock after a validation."""
        if self.paused_at is not None:
            self.started_at += time.perf_counter() - self.paused_at
            self.paused_at = None

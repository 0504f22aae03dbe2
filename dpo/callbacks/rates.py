"""How fast a run goes on, and how long it waits for data.

Takes what Lightning's hooks give; changes nothing about training.
"""

import time
from typing import Any

import lightning as L

from dpo.data.datamodule import PairData
from dpo.data.sampler import Step
from dpo.training.base import is_logged_step


class ThroughputLogger(L.Callback):
    """Logs tokens per second, seconds per step and the share of time spent waiting for data, validation left out."""

    def __init__(self, data: PairData) -> None:
        """Ask this data how long it kept the loop waiting."""
        self.data = data
        self.paused_at: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin."""
        self.restart_window()

    def restart_window(self) -> None:
        """Begin a new window."""
        self.tokens = self.batches = 0
        self.waited_before, self.started_at = self.data.train_loader.wait_seconds, time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Step, batch_idx: int
    ) -> None:
        """Add the batch; at logged steps log and begin anew."""
        self.tokens += sum(len(micro.tokens) for micro in batch.micro_batches) * trainer.world_size
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
        """Stop the clock: what follows until the next batch is validation, samples and checkpoints."""
        self.paused_at = time.perf_counter()

    def on_train_batch_start(self, *_: Any) -> None:
        """Go on."""
        if self.paused_at is not None:
            self.started_at += time.perf_counter() - self.paused_at
            self.paused_at = None

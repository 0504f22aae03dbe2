"""How fast a run goes on, and how long it waits for data.

Takes what Lightning's hooks give; changes nothing about training.
"""

import time
from typing import Any

import lightning as L

from dpo.data.datamodule import PairData
from dpo.data.sampler import Step
from dpo.training.base import is_logged


class Rates(L.Callback):
    """Logs tokens per second, seconds per step and the share of time spent waiting for data, validation left out."""

    def __init__(self, data: PairData) -> None:
        """Ask this data how long it kept the loop waiting."""
        self.data = data
        self.paused: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin."""
        self.restart()

    def restart(self) -> None:
        """Begin a new window."""
        self.tokens = self.batches = 0
        self.waited, self.began = self.data.train_loader.waited, time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Step, batch_idx: int
    ) -> None:
        """Add the batch; at logged steps log and begin anew."""
        self.tokens += sum(len(micro.tokens) for micro in batch.micro_batches) * trainer.world_size
        self.batches += 1
        if is_logged(trainer, batch_idx):
            seconds = time.perf_counter() - self.began
            values = {
                "train/tokens_per_second": self.tokens / seconds,
                "train/time/step": seconds / self.batches * trainer.accumulate_grad_batches,
                "train/time/data": (self.data.train_loader.waited - self.waited) / seconds,
            }
            pl_module.log_dict(values, logger=False)
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)
            self.restart()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock: what follows until the next batch is validation, samples and checkpoints."""
        self.paused = time.perf_counter()

    def on_train_batch_start(self, *_: Any) -> None:
        """Go on."""
        if self.paused is not None:
            self.began += time.perf_counter() - self.paused
            self.paused = None

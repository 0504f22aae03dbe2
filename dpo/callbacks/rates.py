"""The callbacks that log training speed, the time spent waiting for data, and how far a run has come."""

import math
import time
from typing import Any

import lightning as L

from dpo.data.datamodule import PairData
from dpo.data.sampler import Step
from dpo.runs.loggers import MetricsCSV
from dpo.training.position import is_logged_step


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


class TrainingClock(L.Callback):
    """Adds ``epoch`` and ``seconds`` to every row of metrics.csv: epochs and training time of the run so far.

    Both go on when a run is resumed; the time in between does not count.
    """

    def __init__(self, metrics_csv: MetricsCSV) -> None:
        """Give the columns to the file of `metrics_csv`."""
        self.metrics_csv = metrics_csv
        self.seconds_before = 0.0
        self.started_at: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of this process."""
        self.started_at = time.perf_counter()
        self.metrics_csv.row_beginning = lambda: {
            "epoch": self._epochs(trainer),
            "seconds": round(self.elapsed_seconds, 2),
        }

    @property
    def elapsed_seconds(self) -> float:
        """Seconds of training up to now, in this process and in those that it resumes."""
        return self.seconds_before + (time.perf_counter() - self.started_at if self.started_at is not None else 0.0)

    def _epochs(self, trainer: L.Trainer) -> float:
        steps = trainer.num_training_batches / trainer.accumulate_grad_batches  # of an epoch
        return round(trainer.global_step / steps, 4) if math.isfinite(steps) else trainer.current_epoch

    # No state of the callback: Lightning would warn that verbs which load the checkpoint lack it.
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the training time so far."""
        checkpoint["training_seconds"] = self.elapsed_seconds

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the training time; checkpoints of earlier versions have none."""
        self.seconds_before = checkpoint.get("training_seconds", 0.0)

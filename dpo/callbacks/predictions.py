"""What goes on beside training: records, rates, predictions, and how a run is stopped in order.

Takes what Lightning's hooks give; changes nothing about training.
"""

import json
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import pyarrow as pa
import yaml
from lightning.pytorch.utilities import rank_zero_info
from pyarrow import parquet

from dpo.online import load, mark
from dpo.pairs import PairData
from dpo.run import Run, complete, jsonl
from dpo.sampler import Step
from dpo.training import is_logged


class Record(L.Callback):
    """Gives the resolved configuration and the audit of the data to the run and to every logger."""

    def __init__(self, run: Run, data: PairData, config: str) -> None:
        """Take them from here."""
        self.run, self.data, self.config = run, data, config

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before anything is trained, and after all that may refuse to: what a run did is not overwritten by that."""
        audits = {split: audit.as_dict() for split, audit in self.data.audits.items()}
        if trainer.is_global_zero:
            self.run.config.write_text(self.config)
            with complete(self.run.audit) as temporary:
                temporary.write_text(json.dumps(audits, indent=2) + "\n")
            self.run.lead()
        for logger in trainer.loggers:
            logger.log_hyperparams({**yaml.safe_load(self.config), "audit": audits})


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


class Predictions(L.Callback):
    """Writes what `predict` finds of every pair, or the answers to every prompt, into the run's folder."""

    def __init__(self, run: Run, output: str = "predictions.jsonl", scorer: str | None = None) -> None:
        """Choose what is written.

        Args:
            run: Into its folder.
            output: Name of the file, which ends in .jsonl or .parquet.
            scorer: ``module:function`` that marks the best and the worst answer to every prompt.

        Raises:
            ValueError: There is no such function, or no such format.
        """
        if Path(output).name != output or not output.endswith((".jsonl", ".parquet")):
            raise ValueError(f"--output: expected the name of a file that ends in .jsonl or .parquet, got {output!r}.")
        self.run, self.output = run, run.folder / output
        self.rows = self.output.with_suffix(".jsonl")
        self.scorer = load(scorer) if scorer else None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew."""
        if trainer.is_global_zero:
            self.run.folder.mkdir(parents=True, exist_ok=True)
            self.rows.unlink(missing_ok=True)
        trainer.strategy.barrier()

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        """Add the rows of a step; every device adds its own."""
        jsonl(self.rows, [mark(row, self.scorer) for row in outputs] if self.scorer else outputs)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say where they are."""
        trainer.strategy.barrier()
        if trainer.is_global_zero and self.rows != self.output:
            with complete(self.output) as temporary, self.rows.open(encoding="utf-8") as lines:
                parquet.write_table(pa.Table.from_pylist(list(map(json.loads, lines))), temporary)
            self.rows.unlink()
        rank_zero_info(f"Predictions: {self.output}")


class Stop(L.Callback):
    """Ends a run in order on SIGINT and SIGTERM: the step is finished, then checkpoint, table and export as always."""

    def __init__(self) -> None:
        """Nothing has been asked yet."""
        self.asked = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over both signals from Lightning, which gives them back when it tears down; the second ends at once."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number
        print(
            "\nStopping after this step: checkpoint, table and export follow. Once more ends at once.",
            flush=True,
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Step, batch_idx: int
    ) -> None:
        """At the end of an optimizer step, stop all devices when one was asked."""
        whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if whole and trainer.strategy.reduce_boolean_decision(bool(self.asked), all=False):
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # whoever sends a signal may not wait for a validation

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal."""
        return 128 + self.asked if self.asked else 0


class LastStep(L.Callback):
    """Validates where a run ends by its number of steps within an epoch; ends of epochs do by themselves."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Step, batch_idx: int
    ) -> None:
        """Let Lightning stop, which validates then, unless it validates here anyway."""
        due = trainer.is_last_batch or (batch_idx + 1) % (trainer.val_check_batch or 1) == 0
        trainer.should_stop |= trainer.global_step == trainer.max_steps and not due

"""The callback that writes the ledger of a fit; `dpo.runs.ledger` says what is in it and reads it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from dpo.callbacks.pair_buffer import PairBuffer
from dpo.data.datamodule import PairData
from dpo.files import remove, write_atomically
from dpo.runs.folder import Run
from dpo.training.base import Stage
from dpo.training.metrics import MetricMeans
from dpo.training.scored_pairs import ScoredPairs


@dataclass(frozen=True)
class LedgerOptions:
    """What the ledger of a preference run holds: ledger.parquet, the values of single pairs.

    Attributes:
        enabled: Write the ledger: every training pair as it was in its training step, which takes no pass of its own,
            and the pairs of every validation.
        pairs: Most validation pairs of every validation, spread evenly over the split and always the same. None: all.
        train_pairs: Training pairs, likewise, that are measured anew at every validation; each costs a forward pass.
    """

    enabled: bool = True
    pairs: int | None = None
    train_pairs: int = 0

    def __post_init__(self) -> None:
        """Check all values.

        Raises:
            ValueError: A value is out of range, or says something about a ledger that is not written.
        """
        if self.pairs is not None and self.pairs < 1:
            raise ValueError(f"--ledger.pairs: expected at least 1 pair, or null for all, got {self.pairs}.")
        if self.train_pairs < 0:
            raise ValueError(f"--ledger.train_pairs: expected at least 0 pairs, got {self.train_pairs}.")
        if not self.enabled and (self.pairs, self.train_pairs) != (None, 0):
            raise ValueError(
                "--ledger.enabled false: expected neither --ledger.pairs nor --ledger.train_pairs beside it, got "
                f"{self.pairs} and {self.train_pairs}. Leave them out, or --ledger.enabled."
            )


class LedgerWriter(L.Callback):
    """Writes ledger.parquet: trained rows before every checkpoint, measured ones at the end of every validation.

    A checkpoint is never without the rows of its steps, so that a resumed run, which begins by removing later rows,
    ends with the ledger of a run that was never stopped. Every process writes files of its own.
    """

    def __init__(self, run: Run, data: PairData, options: LedgerOptions = LedgerOptions()) -> None:  # frozen
        """Write the ledger of a run.

        Args:
            run: The run whose folder is written to.
            data: The data that the run trains and validates on.
            options: What is written.
        """
        self.run = run
        self.data = data
        self.options = options
        self._trained = PairBuffer()
        self._measured = PairBuffer()
        self._validation_ids: pa.Array | None = None  # None: all
        self._unfinished: list[Path] = []  # files of a validation that has not ended; readers pass over their names

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse options of validations where there are none, once the data are read.

        Raises:
            ValueError: Pairs are to be measured at validations, and there are none.
        """
        if not trainer.limit_val_batches and (self.options.pairs, self.options.train_pairs) != (None, 0):
            raise ValueError(
                "--ledger.pairs and --ledger.train_pairs: expected validations, at which they measure pairs, got none. "
                "Leave them out, or see --data.val_fraction and --trainer.limit_val_batches."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove rows behind the checkpoint that training starts from, and begin to listen."""
        assert isinstance(pl_module, Stage)
        if trainer.is_global_zero:
            for file in self.run.ledger_path.glob("*"):
                is_leftover = not file.name.startswith("step-")  # of a process that was killed while writing
                if is_leftover or int(file.name.split("-")[1]) > trainer.global_step:
                    remove(file)
        trainer.strategy.barrier()
        if self.options.enabled and "val" in self.data.pairs_by_split:
            pairs = self.data.sample_pairs("val", self.options.pairs)
            self._validation_ids = pa.array(pairs[row].id for row in range(len(pairs))) if self.options.pairs else None
        if self.options.enabled:
            pl_module.pair_listeners.append(self._receive)

    def _receive(self, stage: L.LightningModule, pairs: ScoredPairs) -> None:
        if stage.trainer.training:
            self._trained.add_pairs(pairs, stage.trainer.global_step + 1)
        else:
            self._measured.add_pairs(pairs, stage.trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Write trained rows if there are many of them."""
        if self._trained.is_full:
            self._write_trained(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the trained rows of the steps in the checkpoint."""
        self._write_trained(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove what an earlier validation of this step has left; a run may repeat it when it resumes."""
        self._unfinished = []
        if trainer.is_global_zero and self.options.enabled:
            for file in self.run.ledger_path.glob(f"{_file_prefix(trainer.global_step)}*-measured-*"):
                remove(file)
        trainer.strategy.barrier()

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Write measured rows if there are many of them."""
        if self._measured.is_full:
            self._write_measured(trainer, "val")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the rows of the validation before the checkpoint that follows it, and measure the training pairs."""
        assert isinstance(pl_module, Stage)
        self._write_measured(trainer, "val")
        if self.options.train_pairs and pl_module.pair_listeners:
            self._measure_training_pairs(trainer, pl_module)
        for file in self._unfinished:
            file.rename(file.with_name(file.name.removeprefix(".")))

    def _measure_training_pairs(self, trainer: L.Trainer, stage: Stage) -> None:
        unused_means = MetricMeans(stage.metric_names).to(stage.device)
        listeners, stage.pair_listeners = stage.pair_listeners, [self._receive]  # no validation pairs for the others
        with trainer.precision_plugin.forward_context():
            for step in self.data.sample_loader("train", self.options.train_pairs):
                for batch in step.micro_batches:
                    stage.losses(batch.to(stage.device), unused_means)
                if self._measured.is_full:
                    self._write_measured(trainer, "train")
        stage.pair_listeners = listeners
        self._write_measured(trainer, "train")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what is left, and listen no longer."""
        self._write_trained(trainer)
        self._stop_listening(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Listen no longer; what is not written belongs to steps behind the last checkpoint."""
        self._stop_listening(pl_module)

    def _stop_listening(self, stage: L.LightningModule) -> None:
        assert isinstance(stage, Stage)
        stage.pair_listeners = [listener for listener in stage.pair_listeners if listener != self._receive]

    def _write_trained(self, trainer: L.Trainer) -> None:
        """Write the rows of all steps that are complete: every call has steps that no call before it had."""
        rows = self._trained.take_rows("train", trainer.global_step, trained=True)
        self._write(rows, f"{_file_prefix(trainer.global_step)}-rank{trainer.global_rank}-trained")

    def _write_measured(self, trainer: L.Trainer, split: str) -> None:
        rows = self._measured.take_rows(split, trainer.global_step, trained=False)
        if split == "val" and self._validation_ids is not None:
            rows = rows.filter(pc.is_in(rows["id"], self._validation_ids))
        number = len(self._unfinished)
        name = f".{_file_prefix(trainer.global_step)}-rank{trainer.global_rank}-measured-{number}"
        self._unfinished += self._write(rows, name)

    def _write(self, rows: pa.Table, name: str) -> list[Path]:
        """Write a file, unless there are no rows for it, and return which."""
        if not len(rows):
            return []
        self.run.ledger_path.mkdir(parents=True, exist_ok=True)
        file = self.run.ledger_path / f"{name}.parquet"
        with write_atomically(file) as temporary:
            parquet.write_table(rows, temporary)
        return [file]


def _file_prefix(step: int) -> str:
    return f"step-{step:08d}"


def check_ledger_stage(stage: Stage, options: LedgerOptions, is_given: bool) -> None:
    """Refuse options of the ledger for a stage without pairs.

    Args:
        stage: The stage that is trained.
        options: The options in force.
        is_given: Whether the command line names any of them.

    Raises:
        ValueError: There is no ledger, and something is asked of it.
    """
    if len(stage.answer_sides) != 2 and (is_given or options != LedgerOptions()):
        raise ValueError(
            f"--ledger: expected none, as {type(stage).__name__} compares no pairs, so that there is no ledger. "
            "Leave the option out, or train --model DPO."
        )

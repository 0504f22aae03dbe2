"""The callback that writes the rows of ``predict`` to a JSON Lines or Parquet file in the run's folder."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow as pa
from lightning.pytorch.utilities import rank_zero_info
from pyarrow import parquet

from dpo.files import append_jsonl, write_atomically
from dpo.runs.folder import Run
from dpo.training.predict import label_best_and_worst, load_scorer


class PredictionWriter(L.Callback):
    """Writes a row for every predicted pair, or for every prompt with its answers, into the run's folder."""

    def __init__(self, run: Run, output: str = "predictions.jsonl", scorer: str | None = None) -> None:
        """Choose the output file and the scorer.

        Args:
            run: The run whose folder the file is written to.
            output: Name of the file; it ends in .jsonl or .parquet.
            scorer: ``module:function`` that scores the answers to a prompt, to mark the best as chosen and the worst
                as rejected.

        Raises:
            ValueError: The scorer does not exist, or `output` is a path or of an unknown format.
        """
        if Path(output).name != output or not output.endswith((".jsonl", ".parquet")):
            raise ValueError(f"--output: expected the name of a file that ends in .jsonl or .parquet, got {output!r}.")
        self.run = run
        self.output_path = run.folder / output
        self.rows_path = self.output_path.with_suffix(".jsonl")
        self.scorer = load_scorer(scorer) if scorer else None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the rows of an earlier prediction."""
        if trainer.is_global_zero:
            self.run.folder.mkdir(parents=True, exist_ok=True)
            self.rows_path.unlink(missing_ok=True)
        trainer.strategy.barrier()

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        """Append the rows of a step; every process appends its own."""
        rows = [label_best_and_worst(row, self.scorer) for row in outputs] if self.scorer else outputs
        append_jsonl(self.rows_path, rows)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Convert the rows to Parquet if that was asked for, and print the path."""
        trainer.strategy.barrier()
        if trainer.is_global_zero and self.rows_path != self.output_path:
            with write_atomically(self.output_path) as temporary, self.rows_path.open(encoding="utf-8") as lines:
                parquet.write_table(pa.Table.from_pylist(list(map(json.loads, lines))), temporary)
            self.rows_path.unlink()
        rank_zero_info(f"Predictions: {self.output_path}")

"""What `predict` finds, written into the run's folder.

Takes rows, gives a file; has the answers marked by a scorer where there is one.
"""

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
        self.run, self.output_path = run, run.folder / output
        self.rows_path = self.output_path.with_suffix(".jsonl")
        self.scorer = load_scorer(scorer) if scorer else None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew."""
        if trainer.is_global_zero:
            self.run.folder.mkdir(parents=True, exist_ok=True)
            self.rows_path.unlink(missing_ok=True)
        trainer.strategy.barrier()

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        """Add the rows of a step; every device adds its own."""
        append_jsonl(
            self.rows_path, [label_best_and_worst(row, self.scorer) for row in outputs] if self.scorer else outputs
        )

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say where they are."""
        trainer.strategy.barrier()
        if trainer.is_global_zero and self.rows_path != self.output_path:
            with write_atomically(self.output_path) as temporary, self.rows_path.open(encoding="utf-8") as lines:
                parquet.write_table(pa.Table.from_pylist(list(map(json.loads, lines))), temporary)
            self.rows_path.unlink()
        rank_zero_info(f"Predictions: {self.output_path}")

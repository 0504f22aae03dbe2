"""The callback that writes the rows of ``predict`` to a JSON Lines or Parquet file in the run's folder."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow as pa
from lightning.pytorch.utilities import rank_zero_info
from pyarrow import parquet

from dpo.files import append_jsonl, write_atomically
from dpo.runs.folder import Run
from dpo.training.predict import AnswerCounts, PredictionRow, label_best_and_worst, load_scorer


class PredictionWriter(L.Callback):
    """Writes a row for every predicted pair, or for every prompt with its answers, into the run's folder."""

    def __init__(self, run: Run, output: str = "predictions.jsonl", scorer: str | None = None) -> None:
        """Choose the output file and the scorer.

        Args:
            run: The run whose folder the file is written to.
            output: Name of the file; it ends in .jsonl or .parquet.
            scorer: ``module:function`` that scores the answers to a prompt, to mark the best as chosen and the worst
                as rejected. ``function(prompt, answers)`` returns one number per answer; prompt is text, or messages
                if the data has messages.

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
        """Begin without the rows of an earlier prediction."""
        if trainer.is_global_zero:
            self.run.folder.mkdir(parents=True, exist_ok=True)
            self.rows_path.write_text("")
        trainer.strategy.barrier()

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Append the rows of a step; every process appends its own."""
        append_jsonl(self.rows_path, list(self._labelled(outputs, batch)) if self.scorer else outputs)

    def _labelled(self, rows: list[PredictionRow], batch: Any) -> Iterator[PredictionRow]:
        assert self.scorer is not None
        given_as_messages = {prompt.id: prompt.given_as_messages for prompt in getattr(batch, "prompts", ())}
        for row in rows:
            yield label_best_and_worst(row, self.scorer, given_as_messages.get(row["id"], False))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Convert the rows to Parquet if that was asked for, and print the path and what came of the prompts.

        Raises:
            ValueError: There is a scorer, and nothing could be labelled.
        """
        trainer.strategy.barrier()
        with self.rows_path.open(encoding="utf-8") as lines:
            counts = AnswerCounts.from_rows(map(json.loads, lines))  # in every process, so that all of them end alike
        trainer.strategy.barrier()
        if trainer.is_global_zero and self.rows_path != self.output_path:
            with write_atomically(self.output_path) as temporary, self.rows_path.open(encoding="utf-8") as lines:
                parquet.write_table(pa.Table.from_pylist(list(map(json.loads, lines))), temporary)
            self.rows_path.unlink()
        rank_zero_info(f"Predictions: {self.output_path}")
        if self.scorer and not counts.labelled:
            raise ValueError(f"--scorer: {counts}.")
        if counts.prompts:
            rank_zero_info(f"{counts}.")

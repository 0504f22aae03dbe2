"""What a person sees of the policy while a run goes on: sampled answers.

Takes what Lightning's hooks give; reads the models of a stage, changes nothing.
"""

from dataclasses import replace
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from dpo.data.datamodule import PairData
from dpo.files import append_jsonl, drop_rows_from_step
from dpo.models.generation import GREEDY_SAMPLING, generate_answers
from dpo.runs.folder import Run
from dpo.training.base import Stage

SAMPLE_COLUMNS = ("prompt", "reference", "policy")


class AnswerSampler(L.Callback):
    """Shows how policy and reference answer the same held-out prompts, at every validation."""

    def __init__(self, run: Run, data: PairData, prompt_count: int = 3, max_new_tokens: int = 64) -> None:
        """Choose how much is shown.

        Args:
            run: Where samples.jsonl is written.
            data: Where the prompts come from.
            prompts: Number of prompts, spread evenly over the validation split.
            max_new_tokens: Longest answer.
        """
        self.run, self.data, self.prompt_count, self.max_new_tokens = run, data, prompt_count, max_new_tokens

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on behind the checkpoint that training goes on from."""
        if trainer.is_global_zero:
            drop_rows_from_step(self.run.samples_path, trainer.global_step + 1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample, show, store."""
        assert isinstance(pl_module, Stage)
        if trainer.sanity_checking or trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        rows = self._sample(trainer.global_step, pl_module.models_by_role())
        print_samples(rows)
        drop_rows_from_step(
            self.run.samples_path, trainer.global_step
        )  # a run that was killed behind its checkpoint validates again
        append_jsonl(self.run.samples_path, rows)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_text("samples", columns=list(rows[0]), data=[list(row.values()) for row in rows])

    def _sample(self, step: int, models: dict[str, PreTrainedModel]) -> list[dict[str, Any]]:
        """The answers of every model."""
        pairs, encoder = self.data.pairs_by_split["val"], self.data.encoder
        asked = [pairs[index] for index in range(0, len(pairs), -(-len(pairs) // self.prompt_count))]
        prompts, sampling = (
            [pair.prompt for pair in asked],
            replace(GREEDY_SAMPLING, max_new_tokens=self.max_new_tokens),
        )
        texts = {
            role: [answer.text for (answer,) in generate_answers(model, encoder, prompts, sampling, seed=0)]
            for role, model in models.items()
        }
        return [
            {
                "step": step,
                "id": pair.id,
                "prompt": encoder.tokenizer.decode(list(pair.prompt), skip_special_tokens=True),
                **{role: answers[number] for role, answers in texts.items()},
            }
            for number, pair in enumerate(asked)
        ]


def print_samples(rows: list[dict[str, Any]]) -> None:
    """Print prompts with the answers of every model beside each other."""
    table = Table(title=f"Held-out prompts after {rows[0]['step']} steps", show_lines=True)
    columns = sorted((name for name in rows[0] if name not in ("step", "id")), key=SAMPLE_COLUMNS.index)
    for column in columns:
        table.add_column(column, ratio=1)
    for row in rows:
        table.add_row(*(Text(row[column].strip()) for column in columns))
    Console().print(table)

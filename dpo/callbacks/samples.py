"""The callback that samples answers to held-out prompts at every validation."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from dpo.data.datamodule import PairData
from dpo.files import append_jsonl, drop_rows_from_step
from dpo.runs.folder import Run
from dpo.training.base import Stage

SAMPLE_COLUMNS = ("prompt", "reference", "policy")


class AnswerSampler(L.Callback):
    """Shows the answers of policy and reference to the same held-out prompts, at every validation.

    They are printed, appended to samples.jsonl and sent to Weights & Biases.
    """

    def __init__(self, run: Run, data: PairData, prompt_count: int = 3, max_new_tokens: int = 64) -> None:
        """Choose how much is sampled.

        Args:
            run: The run whose samples.jsonl is written.
            data: The data whose validation split the prompts come from.
            prompt_count: Largest number of prompts; they are spread evenly over the validation split.
            max_new_tokens: Longest answer, in tokens.
        """
        self.run = run
        self.data = data
        self.prompt_count = prompt_count
        self.max_new_tokens = max_new_tokens

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Drop samples behind the checkpoint that training resumes from."""
        if trainer.is_global_zero:
            drop_rows_from_step(self.run.samples_path, trainer.global_step + 1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample answers, and print, store and log them."""
        assert isinstance(pl_module, Stage)
        if trainer.sanity_checking or trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        rows = self._sample(trainer.global_step, pl_module)
        print_samples(rows)
        # A run that was killed between its samples and its checkpoint repeats the validation.
        drop_rows_from_step(self.run.samples_path, trainer.global_step)
        append_jsonl(self.run.samples_path, rows)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_text("samples", columns=list(rows[0]), data=[list(row.values()) for row in rows])

    def _sample(self, step: int, stage: Stage) -> list[dict[str, Any]]:
        pairs = self.data.pairs_by_split["val"]
        selected = [pairs[index] for index in range(0, len(pairs), math.ceil(len(pairs) / self.prompt_count))]
        prompts = [pair.prompt for pair in selected]
        answers_by_role = {
            role: stage.generate_from_tokens(prompts, role, max_new_tokens=self.max_new_tokens)
            for role in stage.models_by_role()
        }
        return [
            {
                "step": step,
                "id": pair.id,
                "prompt": self.data.tokenizer.decode(list(pair.prompt), skip_special_tokens=True),
                **{role: answers[number] for role, answers in answers_by_role.items()},
            }
            for number, pair in enumerate(selected)
        ]


def print_samples(rows: list[dict[str, Any]]) -> None:
    """Print a table with a row per prompt and the answers of all models side by side."""
    names = [name for name in SAMPLE_COLUMNS if name in rows[0]]
    title = f"Held-out prompts after {rows[0]['step']} steps"
    table = Table(*(Column(name, ratio=1) for name in names), title=title, show_lines=True)
    for row in rows:
        table.add_row(*(Text(row[name].strip()) for name in names))
    Console().print(table)

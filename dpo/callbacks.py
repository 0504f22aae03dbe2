"""What a person sees while a run goes on: the progress bar, rates, sampled answers; and how a run is stopped in order.

Takes what Lightning's hooks give; reads the module's metrics, changes nothing about training.
"""

import json
import signal
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpo.data import HHRLHF
from dpo.run import Run, complete, jsonl
from dpo.sampler import Step
from dpo.sharing import plain
from dpo.training import Stage, is_logged

SHOWN = {
    "loss": "train/loss",
    "accuracy": "train/rewards/accuracies",
    "margin": "train/rewards/margins",
    "tokens/s": "train/tokens_per_second",
    "val": "val/loss",
}


class Bar(RichProgressBar):
    """Lightning's bar with what matters in preference training."""

    def _get_train_description(self, current_epoch: int) -> str:
        """Without the number of epochs, which is -1 where steps are counted."""
        return f"Epoch {current_epoch + 1}"

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Loss, reward accuracy, margin and tokens per second of the last logged step, and the last validation loss."""
        values = trainer.callback_metrics
        return {name: f"{values[key].item():.4g}" for name, key in SHOWN.items() if key in values}


class Record(L.Callback):
    """Gives the resolved configuration and the audit of the data to every logger, and the audit to the run."""

    def __init__(self, run: Run, data: HHRLHF) -> None:
        """Take them from here."""
        self.run, self.data = run, data

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before anything is trained."""
        audits = {split: audit.as_dict() for split, audit in self.data.audits.items()}
        if trainer.is_global_zero:
            with complete(self.run.audit) as temporary:
                temporary.write_text(json.dumps(audits, indent=2) + "\n")
        for logger in trainer.loggers:
            logger.log_hyperparams({**yaml.safe_load(self.run.config.read_text()), "audit": audits})


class Rates(L.Callback):
    """Logs tokens per second, seconds per step and the share of time spent waiting for data, validation left out."""

    def __init__(self, data: HHRLHF) -> None:
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


@torch.no_grad()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], max_new_tokens: int) -> str:
    """The model's greedy answer to a prompt of token ids, up to its end or the next human turn."""
    writer: Any = model  # its `generate` is declared for a private type
    ends = {tokenizer.eos_token_id, *_as_list(model.generation_config.eos_token_id)} - {None}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.eos_token_id,
    )
    ids = torch.tensor([prompt], device=model.device)
    with plain(model):
        output = writer.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    text = str(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
    return text.split("\n\nHuman:")[0].strip()


def _as_list(value: int | list[int] | None) -> Sequence[int | None]:
    return value if isinstance(value, list) else [value]


class Samples(L.Callback):
    """Shows how policy and reference answer the same held-out prompts, at every validation."""

    def __init__(self, run: Run, data: HHRLHF, prompts: int = 3, max_new_tokens: int = 64) -> None:
        """Choose how much is shown.

        Args:
            run: Where samples.jsonl is written.
            data: Where the prompts come from.
            prompts: Number of prompts, spread evenly over the validation split.
            max_new_tokens: Longest answer.
        """
        self.run, self.data, self.prompts, self.max_new_tokens = run, data, prompts, max_new_tokens

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample, show, store."""
        assert isinstance(pl_module, Stage)
        if trainer.sanity_checking or trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        rows = self._sample(trainer.global_step, pl_module.models())
        show(rows)
        jsonl(self.run.samples, rows)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_text("samples", columns=list(rows[0]), data=[list(row.values()) for row in rows])

    def _sample(self, step: int, models: dict[str, PreTrainedModel]) -> list[dict[str, Any]]:
        """The answers of every model."""
        pairs, tokenizer = self.data.pairs["val"], self.data.encoder.tokenizer
        rows = []
        for index in range(0, len(pairs), -(-len(pairs) // self.prompts)):
            prompt = list(pairs[index].prompt)
            answers = {role: answer(model, tokenizer, prompt, self.max_new_tokens) for role, model in models.items()}
            text = tokenizer.decode(prompt, skip_special_tokens=True)
            rows.append({"step": step, "id": pairs[index].id, "prompt": text, **answers})
        return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print prompts with the answers of every model beside each other."""
    table = Table(title=f"Held-out prompts after {rows[0]['step']} steps", show_lines=True)
    columns = [name for name in rows[0] if name not in ("step", "id")]
    for column in columns:
        table.add_column(column, ratio=1)
    for row in rows:
        table.add_row(*(Text(row[column].strip()) for column in columns))
    Console().print(table)


class Predictions(L.Callback):
    """Writes what `predict` finds of every pair to predictions.jsonl."""

    def __init__(self, run: Run) -> None:
        """Write into the folder of a run."""
        self.run = run

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew."""
        if trainer.is_global_zero:
            self.run.folder.mkdir(parents=True, exist_ok=True)
            self.run.predictions.unlink(missing_ok=True)
        trainer.strategy.barrier()

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        """Add the pairs of a step; every device adds its own."""
        jsonl(self.run.predictions, outputs)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say where they are."""
        rank_zero_info(f"Predictions: {self.run.predictions}")


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
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        trainer.should_stop |= trainer.strategy.reduce_boolean_decision(bool(self.asked), all=False)

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal."""
        return 128 + self.asked if self.asked else 0

"""The callback that samples answers to held-out prompts at every validation."""

import math
from typing import Any

import lightning as L
from rich import get_console
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from dpo.data.datamodule import PairData
from dpo.files import append_jsonl, drop_rows_from_step
from dpo.runs.folder import Run
from dpo.runs.results import frame_of
from dpo.runs.trackers import log_samples
from dpo.training.base import Stage

SAMPLE_COLUMNS = ("prompt", "reference", "policy")
PRINTED_LINES = 5  # most lines of a cell: with three prompts, the table fits a terminal of 24 lines
ELLIPSIS = "..."


class AnswerSampler(L.Callback):
    """Shows the answers of policy and reference to the same held-out prompts, at every validation.

    They are printed, appended to samples.jsonl and sent to the loggers.
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
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        rows = self._sample(trainer.global_step, pl_module)  # in all processes: weights may be spread over them
        if not trainer.is_global_zero:
            return
        print_samples(rows)
        # A run that was killed between its samples and its checkpoint repeats the validation.
        drop_rows_from_step(self.run.samples_path, trainer.global_step)
        append_jsonl(self.run.samples_path, rows)
        for logger in trainer.loggers:
            log_samples(logger, rows)

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
                **{role: answers[number].text for role, answers in answers_by_role.items()},
                **{f"{role}_ended": answers[number].is_complete for role, answers in answers_by_role.items()},
            }
            for number, pair in enumerate(selected)
        ]


def print_samples(rows: list[dict[str, Any]]) -> None:
    """Print a table with a row per prompt: the end of its last turn, and the first lines of all models' answers."""
    console = get_console()  # the one that a progress bar is drawn on
    names = [name for name in SAMPLE_COLUMNS if name in rows[0]]
    title = f"Held-out prompts after {rows[0]['step']} steps"
    width = (console.width - 1) // len(names) - 3  # characters; a frame and two spaces are beside every column
    columns = (Column(name, width=width) for name in names)
    table = Table(*columns, title=title, show_lines=True, box=frame_of(console))
    for row in rows:
        answers = (first_lines(row[name], width, console) for name in names if name != "prompt")
        table.add_row(last_turn_lines(row["prompt"], width, console), *answers)
    console.print(table)


def first_lines(text: str, width: int, console: Console) -> Text:
    """Return the first lines of a text, `PRINTED_LINES` at most, with "..." where it goes on."""
    lines = _wrap(text, width, console)
    shown = lines[:PRINTED_LINES]
    if len(lines) > PRINTED_LINES:
        shown[-1].truncate(width - len(ELLIPSIS))
        shown[-1].append(ELLIPSIS)
    return Text("\n").join(shown)


def last_turn_lines(prompt: str, width: int, console: Console) -> Text:
    """Return the last lines of a prompt's last turn, `PRINTED_LINES` at most, with "..." where something is before."""
    before, _, turn = prompt.strip().rpartition("\n\nHuman:")
    turn = turn.removesuffix("Assistant:").strip().removeprefix("Human:").strip()
    lines = _wrap(f"{ELLIPSIS} {turn}" if before else turn, width, console)
    shown = lines[-PRINTED_LINES:]
    if len(lines) > PRINTED_LINES:
        shown[0] = Text(ELLIPSIS)
    return Text("\n").join(shown)


def _wrap(text: str, width: int, console: Console) -> list[Text]:
    # A model may write anything, also what would move the cursor or change the terminal.
    safe = "".join(each if each.isprintable() or each == "\n" else _stand_in(each) for each in text.strip())
    lines = Text(safe).wrap(console, width)
    return [line for line in lines if line.plain.strip()]


def _stand_in(character: str) -> str:
    return " " if character.isspace() else "\ufffd"

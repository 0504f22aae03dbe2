"""Progress on the console: one line that is redrawn on a terminal, plain lines elsewhere."""

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, Timer
from rich import get_console
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from dpo.training.position import log_interval

PROGRESS_METRICS = {
    "loss": "train/loss",
    "accuracy": "train/rewards/accuracies",
    "margin": "train/rewards/margins",
    "tokens/s": "train/tokens_per_second",
    "val": "val/loss",
}
BY_IMPORTANCE = ("loss", "val", "accuracy", "margin", "tokens/s")  # a narrow terminal leaves out the last ones
SMALLEST_BAR = 10  # characters


class TrainingProgressBar(ProgressBar):
    """One line at the bottom of the terminal: step and total, a bar, the time left and the metrics that fit.

    What is printed or logged meanwhile appears above it. Where the output is not a terminal, it shows nothing.
    """

    def __init__(self) -> None:
        """Start without a line."""
        super().__init__()
        self.enabled = True
        self.bar: Progress | None = None
        self.open_contexts = ExitStack()
        self.values: dict[str, str] = {}  # as of the last logged step: reading them waits for the device

    def disable(self) -> None:
        """Show nothing; Lightning calls this in all processes but the first."""
        self.enabled = False

    def enable(self) -> None:
        """Show the line again after `disable`."""
        self.enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the line, and start the clock by which the time left is estimated."""
        self.started_at, self.first_step = time.monotonic(), trainer.global_step
        self._show_training(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Show what was logged at the end of the previous batch, for which the device was waited for already."""
        if is_at_logged_step(trainer):
            self.values = progress_values(trainer)
            self._show_training(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Show the step that was taken."""
        self._show_training(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the line as it is after the last step."""
        self.values = progress_values(trainer)
        self._show_training(trainer)
        self._close()

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Show how much of the validation split is done."""
        self._show("validation", batch_idx + 1, trainer.num_val_batches[dataloader_idx])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the training again, or end."""
        if trainer.state.fn != "fit":
            self._close()
        elif trainer.training and not trainer.sanity_checking:
            self.values = progress_values(trainer)
            self._show_training(trainer)

    def on_test_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Show how much of the test split is done."""
        self._show("test", batch_idx + 1, trainer.num_test_batches[dataloader_idx])

    def on_predict_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Show how much is predicted."""
        self._show("predict", batch_idx + 1, trainer.num_predict_batches[dataloader_idx])

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the terminal as it was found, however the verb ended."""
        self._close()

    def _show_training(self, trainer: L.Trainer) -> None:
        fraction, seconds_left = training_progress(trainer, self.started_at, self.first_step)
        remaining = f"{timedelta(seconds=round(seconds_left))} left" if math.isfinite(seconds_left) else ""
        self._draw(step_of_total(trainer), fraction, [remaining], self.values)

    def _show(self, what: str, done: int, total: float) -> None:
        count = f"{done}/{total}" if math.isfinite(total) else str(done)
        self._draw(f"{what} {count}", done / total, [], {})

    def _draw(self, label: str, fraction: float, first: list[str], values: dict[str, str]) -> None:
        console = get_console()
        if not self.enabled or not console.is_terminal:
            return
        if self.bar is None:
            columns = [TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.fields[values]}")]
            # stderr is redirected only where it is the same terminal
            self.bar = Progress(
                *columns, console=console, expand=True, refresh_per_second=4, redirect_stderr=sys.stderr.isatty()
            )
            self.bar.add_task(label, total=1.0, values="")
            self.open_contexts.enter_context(self.bar)
            self.open_contexts.enter_context(logs_to_current_stderr())
        room = console.width - len(label) - SMALLEST_BAR - 2
        items = [*first, *(f"{name} {values[name]}" for name in BY_IMPORTANCE if name in values)]
        self.bar.update(self.bar.task_ids[0], description=label, completed=fraction, values=join_what_fits(items, room))

    def _close(self) -> None:
        self.open_contexts.close()
        self.bar = None


class ProgressLines(L.Callback):
    """Prints the progress bar's metrics as a line per logged step where the output is not a terminal."""

    def __init__(self) -> None:
        """Start before the first step."""
        self.last_printed_step = 0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Print what was logged at the end of the previous batch."""
        self._print(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print what was logged at the last step."""
        self._print(trainer)

    def _print(self, trainer: L.Trainer) -> None:
        step = trainer.global_step
        is_new = step != self.last_printed_step and "train/loss" in trainer.callback_metrics
        if is_new and is_at_logged_step(trainer) and trainer.is_global_zero and not Console().is_terminal:
            values = "  ".join(f"{name} {value}" for name, value in progress_values(trainer).items())
            print(f"{step_of_total(trainer)}  {values}", flush=True)
            self.last_printed_step = step


def is_at_logged_step(trainer: L.Trainer) -> bool:
    """Return whether the metrics of the last optimizer step were logged."""
    return trainer.global_step % log_interval(trainer) == 0


def training_progress(trainer: L.Trainer, started_at: float, first_step: int) -> tuple[float, float]:
    """Return the share of training that is done, and an estimate of the seconds left; infinite if nothing limits them.

    Args:
        trainer: The trainer, whose steps, epochs and time may all be limited; the first limit reached counts.
        started_at: `time.monotonic()` when training began in this process.
        first_step: The step at which it began.
    """
    step, total = trainer.global_step, trainer.estimated_stepping_batches
    seconds_left = math.inf
    if step > first_step:
        seconds_left = (total - step) * (time.monotonic() - started_at) / (step - first_step)
    fraction = step / total
    for timer in (each for each in trainer.callbacks if isinstance(each, Timer)):  # type: ignore[attr-defined]
        remaining = timer.time_remaining()
        if remaining is not None:
            fraction = max(fraction, 1 - remaining / (remaining + timer.time_elapsed()))
            seconds_left = min(seconds_left, max(remaining, 0.0))
    return fraction, seconds_left


def step_of_total(trainer: L.Trainer) -> str:
    """Return the step and, where steps or epochs are limited, the last one: ``step 20/168``."""
    total = trainer.estimated_stepping_batches
    return f"step {trainer.global_step}" + (f"/{int(total)}" if math.isfinite(total) else "")


def progress_values(trainer: L.Trainer) -> dict[str, str]:
    """Return those `PROGRESS_METRICS` that were logged so far, formatted to four digits."""
    metrics = trainer.callback_metrics
    return {name: _four_digits(metrics[key].item()) for name, key in PROGRESS_METRICS.items() if key in metrics}


def _four_digits(value: float) -> str:
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"


def join_what_fits(items: list[str], room: int) -> str:
    """Return the first items, separated by two spaces, as many as fit into a number of characters."""
    text = ""
    for item in filter(None, items):
        longer = f"{text}  {item}" if text else item
        if len(longer) > room:
            break
        text = longer
    return text


@contextmanager
def logs_to_current_stderr() -> Iterator[None]:
    """Let log handlers write to `sys.stderr` as it is now, instead of the stream that it was when they were made."""
    loggers = [logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    handlers = {each for logger in loggers for each in logger.handlers if type(each) is logging.StreamHandler}
    moved = [(each, each.setStream(sys.stderr)) for each in handlers if each.stream is sys.__stderr__]
    try:
        yield
    finally:
        for handler, stream in moved:
            handler.setStream(stream)

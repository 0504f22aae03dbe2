"""Training progress on the console: a progress bar on a terminal, plain lines elsewhere."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console

PROGRESS_METRICS = {
    "loss": "train/loss",
    "accuracy": "train/rewards/accuracies",
    "margin": "train/rewards/margins",
    "tokens/s": "train/tokens_per_second",
    "val": "val/loss",
}


class TrainingProgressBar(RichProgressBar):
    """Lightning's progress bar with the metrics of `PROGRESS_METRICS`."""

    def _get_train_description(self, current_epoch: int) -> str:
        # Lightning adds the number of epochs, which is -1 in a run that is limited by steps.
        return f"Epoch {current_epoch + 1}"

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Return the metrics of the last logged step and the last validation loss."""
        return progress_values(trainer)


class ProgressLines(L.Callback):
    """Prints the progress bar's metrics as a line per logged step where the output is not a terminal.

    There, the bar would be printed only once, at the end.
    """

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
        is_logged = step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if is_new and is_logged and trainer.is_global_zero and not Console().is_terminal:
            values = "  ".join(f"{name} {value}" for name, value in progress_values(trainer).items())
            print(f"step {step}/{int(trainer.estimated_stepping_batches)}  {values}", flush=True)
            self.last_printed_step = step


def progress_values(trainer: L.Trainer) -> dict[str, str]:
    """Return those `PROGRESS_METRICS` that were logged so far, formatted to four digits."""
    metrics = trainer.callback_metrics
    return {name: f"{metrics[key].item():.4g}" for name, key in PROGRESS_METRICS.items() if key in metrics}

"""What a person sees of the numbers while a run goes on: the progress bar, or lines.

Takes what Lightning's hooks give; reads the metrics of a stage, changes nothing.
"""

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
    """Lightning's bar with what matters in preference training."""

    def _get_train_description(self, current_epoch: int) -> str:
        """Without the number of epochs, which is -1 where steps are counted."""
        return f"Epoch {current_epoch + 1}"

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Loss, reward accuracy, margin and tokens per second of the last logged step, and the last validation loss."""
        return progress_values(trainer)


class ProgressLines(L.Callback):
    """The same as lines, one per logged step, where the output is no terminal and a bar would show once, at the end."""

    def __init__(self) -> None:
        """Nothing is printed yet."""
        self.last_printed_step = 0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Print what was logged when the last batch ended."""
        self._print(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the last step."""
        self._print(trainer)

    def _print(self, trainer: L.Trainer) -> None:
        fresh = trainer.global_step != self.last_printed_step and trainer.callback_metrics.get("train/loss") is not None
        due = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if fresh and due and trainer.is_global_zero and not Console().is_terminal:
            values = "  ".join(f"{name} {value}" for name, value in progress_values(trainer).items())
            print(f"step {trainer.global_step}/{int(trainer.estimated_stepping_batches)}  {values}", flush=True)
            self.last_printed_step = trainer.global_step


def progress_values(trainer: L.Trainer) -> dict[str, str]:
    """What is worth a look, as far as it is known by now."""
    values = trainer.callback_metrics
    return {name: f"{values[key].item():.4g}" for name, key in PROGRESS_METRICS.items() if key in values}

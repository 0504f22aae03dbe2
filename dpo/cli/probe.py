"""Three steps of a ``fit`` that leaves nothing behind, to measure how fast the devices at hand are."""

import tempfile
import time
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from dpo.cli.main import main as run_command_line
from dpo.cli.training_cli import TrainingCLI

PROBE_OPTIONS = ("--trainer.max_steps", "3", "--trainer.limit_val_batches", "0", "--trainer.logger", "false")


class _StepClock(L.Callback):
    """Measures steps; the first, in which kernels are chosen and compiled, does not count."""

    def __init__(self) -> None:
        self.began = 0.0
        self.seconds = 0.0
        self.tokens = 0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.began = _time_when_done()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx:
            self.seconds += _time_when_done() - self.began
            self.tokens += sum(len(micro.tokens) for micro in batch.micro_batches)


def _time_when_done() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measured_tokens(fit_options: Sequence[str]) -> float:
    """Return the tokens per second of one device here, by three steps of a fit whose folder is removed.

    Raises:
        SystemExit: The fit was refused; the message is on stderr.
    """
    clock = _StepClock()

    class ProbeCLI(TrainingCLI):
        """Trains three steps."""

        def instantiate_trainer(self, **options: Any) -> L.Trainer:
            """Return the trainer of a fit, with a clock."""
            trainer = super().instantiate_trainer(**options)
            trainer.callbacks.append(clock)  # type: ignore[attr-defined]  # Lightning does not declare it
            return trainer

        def after_fit(self) -> None:
            """Export nothing."""

    with tempfile.TemporaryDirectory() as folder:
        words = [*fit_options, *PROBE_OPTIONS, "--trainer.default_root_dir", folder, "--name", "probe"]
        if code := run_command_line(["fit", *words], ProbeCLI):
            raise SystemExit(code)
    return clock.tokens / clock.seconds

"""What a run is doing while it prints nothing else, said once such work has taken longer than a moment."""

import threading
from typing import Any

import lightning as L
from rich import get_console

PATIENCE = 1.5  # seconds of silence before a line says what is going on


class SlowWork(L.Callback):
    """Prints what a verb is doing if that takes longer than `PATIENCE`, so that no long work is silent."""

    def __init__(self) -> None:
        """Start with nothing to say."""
        self.timer = threading.Timer(0, print)
        self.has_stepped = False

    def begin(self, description: str) -> None:
        """Print the description if neither `begin` nor `end` is called within `PATIENCE`."""
        self.end()
        self.timer = threading.Timer(PATIENCE, lambda: print(f"{description} ...", flush=True))
        self.timer.daemon = True
        self.timer.start()

    def end(self) -> None:
        """Print nothing more of what was begun last."""
        self.timer.cancel()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Announce what follows the reading of the data."""
        if trainer.is_global_zero:
            self.begin("Loading models")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Announce the checks before training."""
        if trainer.is_global_zero:
            self.begin("Checking models and data")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Announce the first step, in which layers may be compiled, where no bar shows it."""
        self._begin_without_bar(trainer, "Taking the first step")

    def on_train_batch_start(self, *_: Any) -> None:
        """What followed a validation has ended."""
        if self.has_stepped:
            self.end()

    def on_train_batch_end(self, *_: Any) -> None:
        """A step has ended; further ones are shown by the progress bar or its lines."""
        self.has_stepped = True
        self.end()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Announce a validation where no bar shows it."""
        self._begin_without_bar(trainer, "Validating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Announce what follows a validation in other callbacks."""
        self.end()
        if trainer.state.fn == "fit" and trainer.is_global_zero:
            self.begin("Sampling answers and saving a checkpoint")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What followed the last validation has ended."""
        self.end()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Announce the test where no bar shows it."""
        self._begin_without_bar(trainer, "Testing")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Announce the prediction where no bar shows it."""
        self._begin_without_bar(trainer, "Predicting")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Everything that was announced has ended."""
        self.end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Everything that was announced has ended."""
        self.end()

    def _begin_without_bar(self, trainer: L.Trainer, description: str) -> None:
        self.end()
        if trainer.is_global_zero and not get_console().is_terminal:
            self.begin(description)

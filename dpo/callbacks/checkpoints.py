"""The callback that decides when ``last.ckpt`` and ``best.ckpt`` are saved, and how many generations are kept."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn

from dpo.callbacks.agreement import agreement_of
from dpo.runs.folder import Run
from dpo.runs.signals import RUN_SIGNALS
from dpo.training.nonfinite import NonFiniteError


@dataclass(frozen=True)
class CheckpointCadence:
    """When a run saves besides validations and ends of epochs, and what it keeps.

    Attributes:
        every_n_steps: Optimizer steps from one save to the next. None: saves do not depend on steps.
        every_minutes: Minutes from one save to the next at most. None: saves do not depend on time.
        keep: Generations of last.ckpt: a run goes on from the one before if the newest is damaged.
        monitor: Metric of the validations (val/...) that decides which of them best.ckpt holds.
        mode: Whether its lowest (min) or its highest (max) value is the best. Needed for another one than val/loss.
    """

    every_n_steps: int | None = None
    every_minutes: float | None = 15.0
    keep: int = 2
    monitor: str = "val/loss"
    mode: Literal["min", "max"] | None = None

    def __post_init__(self) -> None:
        """Check all values.

        Raises:
            ValueError: A value is out of range.
        """
        for name, value in (("every_n_steps", self.every_n_steps), ("every_minutes", self.every_minutes)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--checkpoint.{name}: expected a number above 0, or null, got {value}.")
        if self.keep < 1:
            raise ValueError(f"--checkpoint.keep: expected at least 1 generation, got {self.keep}.")
        if not self.monitor.startswith("val/"):
            raise ValueError(
                f"--checkpoint.monitor: expected a metric of the validations (val/...), got {self.monitor!r}."
            )
        if self.mode is None and self.monitor != "val/loss":
            raise ValueError(f"--checkpoint.mode: expected min or max beside --checkpoint.monitor {self.monitor}.")


class LastAndBest(Checkpoint):
    """Saves last.ckpt before and after every validation, at ends of epochs and by the cadence; best.ckpt at the best.

    The best is the lowest validation loss, unless the cadence names another metric. If an exception ends the run, the
    state after the last good step is saved.
    """

    def __init__(self, run: Run, cadence: CheckpointCadence = CheckpointCadence()) -> None:  # frozen
        """Save into the checkpoint folder of `run`."""
        self.run = run
        self.cadence = cadence
        self.monitor = cadence.monitor
        self.sign = -1 if cadence.mode == "max" else 1
        self.best_value = self.sign * math.inf
        self.saved_step = 0  # optimizer steps of the newest last.ckpt
        self.saved_at = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from where training starts: a resumed run has a checkpoint of that step."""
        self.saved_step = trainer.global_step
        self.saved_at = time.monotonic()
        agreement_of(trainer).numbers["late"] = self._is_late

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save last.ckpt before a validation, which may take long."""
        if self._is_fitting(trainer) and trainer.global_step > self.saved_step:
            self._save_last(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save last.ckpt, and best.ckpt if the validation is the best so far."""
        if not self._is_fitting(trainer):
            return
        value = trainer.callback_metrics[self.monitor].item()
        if self.sign * value < self.sign * self.best_value:
            self.best_value = value
            self._save(trainer, "best")
        self._save_last(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Save last.ckpt when the cadence says so, and after the last batch of an epoch or run."""
        ends = trainer.is_last_batch or trainer.should_stop or trainer.global_step == trainer.max_steps
        is_step_end = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if ends or (is_step_end and self._is_due(trainer)):
            self._save_last(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save the state after the last good step, unless the run was interrupted or other processes may be gone."""
        expected = isinstance(exception, Exception) and not isinstance(exception, OSError)
        unsaved = self._is_fitting(trainer) and trainer.global_step > self.saved_step
        if not (expected and unsaved and trainer.world_size == 1):
            return
        try:
            self._save_last(trainer)
        except NonFiniteError:
            return  # steps after the broken one were skipped: there is no good state
        except Exception as error:
            rank_zero_warn(f"the state after step {trainer.global_step} could not be saved: {error}")

    def _is_fitting(self, trainer: L.Trainer) -> bool:
        return trainer.state.fn == "fit" and not trainer.sanity_checking

    def _is_due(self, trainer: L.Trainer) -> bool:
        steps = self.cadence.every_n_steps
        if steps and trainer.global_step % steps == 0:
            return True
        return bool(agreement_of(trainer).largest(trainer, "late"))  # clocks differ, saving is for all

    def _is_late(self) -> bool:
        minutes = self.cadence.every_minutes
        return minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes

    def _save_last(self, trainer: L.Trainer) -> None:
        with RUN_SIGNALS.finishing():
            if trainer.is_global_zero and trainer.global_step != self.saved_step:
                self.run.rotate_last_checkpoint(self.cadence.keep)
            self._save(trainer, "last")
        self.saved_step = trainer.global_step
        self.saved_at = time.monotonic()

    def _save(self, trainer: L.Trainer, name: str) -> None:
        with RUN_SIGNALS.finishing():
            trainer.save_checkpoint(self.run.checkpoint_folder / f"{name}.ckpt", weights_only=False)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far and what it is of, for the checkpoint."""
        return {"best": self.best_value, "monitor": self._monitored}

    @property
    def _monitored(self) -> str:
        return f"{self.monitor} {'max' if self.sign < 0 else 'min'}"

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the best value so far from a checkpoint, unless another metric was watched."""
        if state_dict.get("monitor", "val/loss min") == self._monitored:
            self.best_value = state_dict["best"]

"""How a training ended, and the command line with which it goes on."""

import shlex
import signal
import sys
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, Timer

from dpo.runs.folder import Run


def ending_lines(trainer: L.Trainer, run: Run, signal_number: int) -> str:
    """Return after how many steps a training ended and why, and how to go on if it was cut short.

    Args:
        trainer: The trainer, after its fit.
        run: The run that it trained.
        signal_number: The signal that stopped it, or 0.
    """
    steps, planned = trainer.global_step, trainer.estimated_stepping_batches
    total = "" if planned == float("inf") else f" of {int(planned)}"
    timers = [timer for timer in trainer.callbacks if isinstance(timer, Timer)]  # type: ignore[attr-defined]
    more = ""
    if signal_number:
        reason = f"stopped by {signal.Signals(signal_number).name}"
    elif any((timer.time_remaining() or 0) <= 0 for timer in timers if timer.time_remaining() is not None):
        reason = "the time of --trainer.max_time is up"
        more = " --trainer.max_time DD:HH:MM:SS  (all of the run's time, so more than before)"
    elif any(each.stopped_epoch for each in trainer.early_stopping_callbacks):
        return f"Trained {steps}{total} steps: stopped by {EarlyStopping.__name__}."
    else:
        limit = "max_steps" if steps == trainer.max_steps else "max_epochs"
        return f"Trained {steps}{total} steps: --trainer.{limit} {getattr(trainer, limit)} is reached."
    return f"Trained {steps}{total} steps: {reason}. To go on:\n  {_resuming_command(run)}{more}"


def stopped_lines(run: Run, signal_number: int) -> str:
    """Return that a signal has ended a fit at once, and how to go on if there is a checkpoint; empty otherwise."""
    if not signal_number or not (run.checkpoint_folder / "last.ckpt").is_file():
        return ""
    name = signal.Signals(signal_number).name
    return f"Stopped by {name}, without results and export. To go on:\n  {_resuming_command(run)}"


def _resuming_command(run: Run) -> str:
    command = [*_program(), "fit", "--config", str(run.config_path), "--ckpt_path"]
    return shlex.join([*command, str(run.checkpoint_folder / "last.ckpt")])


def _program() -> list[str]:
    name = Path(sys.argv[0]).name
    return ["python", "-m", "dpo"] if name == "__main__.py" else ["dpo"] if name == "dpo" else ["python", sys.argv[0]]

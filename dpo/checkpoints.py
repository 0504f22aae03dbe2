"""Checkpoints that are complete or absent, and checked when they are read.

Takes what Lightning wants saved; writes last.ckpt and best.ckpt, each with its SHA-256 beside it. Knows nothing of
losses.
"""

import hashlib
import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from dpo.run import Run, complete


class NotWritten(OSError):
    """A checkpoint could not be written."""


class AtomicIO(CheckpointIO):
    """Writes aside, flushes, renames; reads only what hashes as written, and never unpickles code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint and its hash.

        Raises:
            NotWritten: The disk does not take it; says how full it is, and which checkpoints are whole.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with complete(path) as temporary:
            try:
                torch.save(checkpoint, temporary)
            except (OSError, RuntimeError) as error:  # what torch makes of a disk that is full
                raise NotWritten(_lost(path, error)) from error
            digest = _sha256(temporary)
            _beside(path).unlink(missing_ok=True)  # killed from here on: a checkpoint without a hash, not a wrong one
        with complete(_beside(path)) as temporary:
            temporary.write_text(digest + "\n")

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            ValueError: It is not a local file, its bytes are not those that were written, or it holds more than
                tensors and plain values.
        """
        path = local_file(path)
        digest = _beside(path)
        if digest.exists() and digest.read_text().strip() != _sha256(path):
            raise ValueError(
                f"{path} was changed or cut after it was written: its SHA-256 is not that of {digest.name}. "
                "Go on from another checkpoint."
            )
        try:
            loaded: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{path} is not a checkpoint of tensors and plain values: {error}") from error
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint and its hash."""
        Path(path).unlink(missing_ok=True)
        _beside(Path(path)).unlink(missing_ok=True)


def local_file(path: str | Path) -> Path:
    """The path of a checkpoint that is there.

    Raises:
        ValueError: It is not a file on this machine.
    """
    if "://" in str(path) or not Path(path).is_file():
        hint = " The first validation of a run writes it." if Path(path).name == "best.ckpt" else ""
        raise ValueError(f"--ckpt_path: expected last, best or a checkpoint file on this machine, got {path}.{hint}")
    return Path(path)


def _lost(path: Path, error: Exception) -> str:
    free = shutil.disk_usage(path.parent).free / 2**20
    whole = sorted(map(str, path.parent.glob("*.ckpt")))
    go_on = f"Checkpoints of before that are whole: {', '.join(whole)}. Make room, and go on from one with --ckpt_path."
    return (
        f"the checkpoint {path} could not be written. Is the disk full? {free:,.0f} MiB of it are free. ({error})\n"
        f"{go_on if whole else 'There is no checkpoint of before. Make room, and begin the run again.'}"
    )


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class LastAndBest(Checkpoint):
    """Saves last.ckpt after every validation and epoch and at the end, best.ckpt at the lowest validation loss."""

    def __init__(self, run: Run) -> None:
        """Save into the folder of a run."""
        self.run = run
        self.best = math.inf

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save both."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        loss = trainer.callback_metrics["val/loss"].item()
        if loss < self.best:
            self.best = loss
            self._save(trainer, "best")
        self._save(trainer, "last")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """After the last batch save, before the validation that may follow."""
        if trainer.is_last_batch or trainer.should_stop or trainer.global_step == trainer.max_steps:
            self._save(trainer, "last")

    def _save(self, trainer: L.Trainer, name: str) -> None:
        trainer.save_checkpoint(self.run.checkpoints / f"{name}.ckpt", weights_only=False)

    def state_dict(self) -> dict[str, Any]:
        """The best loss so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.best = state_dict["best"]


class Settings(L.Callback):
    """Goes on from a checkpoint with the optimizer's options and the schedule of the command line, not with saved ones.

    What is saved of them is what they had been. Where they are the same, a resumed run is the uninterrupted one.
    """

    saved = ""  # optimizer of the checkpoint that training goes on from

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember which optimizer the saved state is of."""
        checkpoint["optimizer"] = type(trainer.optimizers[0]).__name__

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look it up."""
        self.saved = checkpoint["optimizer"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before the state is restored.

        Raises:
            ValueError: It is of another optimizer.
        """
        name = type(trainer.optimizers[0]).__name__
        if self.saved not in ("", name):
            raise ValueError(
                f"the checkpoint holds the state of {self.saved}: expected --optimizer {self.saved}, got {name}. "
                "To change it, begin a run with --model.policy at the export of this one."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make optimizer and schedule anew, go as many steps along the schedule, and take over all but the state."""
        if not self.saved:
            return
        (optimizer,), configs = trainer.optimizers, trainer.lr_scheduler_configs
        made: Any = pl_module.configure_optimizers()
        if configs:
            schedule, made = made["lr_scheduler"]["scheduler"], made["optimizer"]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # there are no steps to take
                for _ in range(trainer.global_step):
                    schedule.step()
            configs[0].scheduler.load_state_dict(schedule.state_dict())
        for group, chosen in zip(optimizer.param_groups, made.param_groups, strict=True):
            options = {name: value for name, value in chosen.items() if name != "params"}
            changed = [name for name, value in options.items() if name in group and group[name] != value]
            for name in changed:
                rank_zero_info(f"Optimizer: {name} is {options[name]}, in the checkpoint {group[name]}.")
            group.update(options)
            _count_on_device(optimizer, group)


def _count_on_device(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """A fused optimizer counts its steps on the device, where one that was not has counted on the host."""
    for parameter in group["params"] if group.get("fused") else ():
        state = optimizer.state.get(parameter, {})
        if "step" in state:
            state["step"] = state["step"].to(parameter.device, torch.float32)

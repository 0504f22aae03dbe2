"""Checkpoints that are complete or absent, and checked when they are read.

Takes what Lightning wants saved; writes last.ckpt and best.ckpt, each with its SHA-256 beside it. Knows nothing of
losses.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from dpo.run import Run, complete


class AtomicIO(CheckpointIO):
    """Writes aside, flushes, renames; reads only what hashes as written, and never unpickles code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint and its hash."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with complete(path) as temporary:
            torch.save(checkpoint, temporary)
            digest = _sha256(temporary)
        with complete(_beside(path)) as temporary:
            temporary.write_text(digest + "\n")

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            ValueError: It is not a local file, or its bytes are not those that were written.
        """
        if "://" in str(path) or not Path(path).is_file():
            raise ValueError(f"--ckpt_path: expected a checkpoint file on this machine, got {path}.")
        digest = _beside(Path(path))
        if digest.exists() and digest.read_text().strip() != _sha256(Path(path)):
            raise ValueError(
                f"{path} was changed or cut after it was written: its SHA-256 is not that of {digest.name}."
            )
        loaded: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint and its hash."""
        Path(path).unlink(missing_ok=True)
        _beside(Path(path)).unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class LastAndBest(Checkpoint):
    """Saves last.ckpt after every validation, epoch and at the end, best.ckpt at the lowest validation loss."""

    def __init__(self, run: Run) -> None:
        """Save into the folder of a run."""
        self.run = run
        self.best: float | None = None
        self.saved = -1

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save both."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        loss = trainer.callback_metrics["val/loss"].item()
        better = self.best is None or loss < self.best
        self.best = loss if self.best is None else min(loss, self.best)
        for name in ["best", "last"] if better else ["last"]:
            trainer.save_checkpoint(self.run.checkpoints / f"{name}.ckpt")
        self.saved = trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last state, unless it was saved at this step."""
        if self.saved != trainer.global_step:
            trainer.save_checkpoint(self.run.checkpoints / "last.ckpt")
            self.saved = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """The best loss so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.best = state_dict["best"]

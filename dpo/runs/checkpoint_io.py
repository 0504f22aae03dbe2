"""Checkpoints that are complete or absent, and checked when they are read.

Takes what Lightning wants saved; writes last.ckpt and best.ckpt, each with its SHA-256 beside it. Knows nothing of
losses.
"""

import hashlib
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from dpo.files import write_atomically


class CheckpointWriteError(OSError):
    """A checkpoint could not be written."""


class AtomicCheckpointIO(CheckpointIO):
    """Writes aside, flushes, renames; reads only what hashes as written, and never unpickles code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint and its hash.

        Raises:
            NotWritten: The disk does not take it; says how full it is, and which checkpoints are whole.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as temporary:
            try:
                torch.save(checkpoint, temporary)
            except (OSError, RuntimeError) as error:  # what torch makes of a disk that is full
                raise CheckpointWriteError(_lost(path, error)) from error
            digest = _sha256(temporary)
            _beside(path).unlink(missing_ok=True)  # killed from here on: a checkpoint without a hash, not a wrong one
        with write_atomically(_beside(path)) as temporary:
            temporary.write_text(digest + "\n")

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            ValueError: It is not a local file, its bytes are not those that were written, or it holds more than
                tensors and plain values.
        """
        path = local_checkpoint(path)
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


def local_checkpoint(path: str | Path) -> Path:
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

"""Checkpoint files that are either complete or absent, and verified when they are read.

`AtomicCheckpointIO` is Lightning's plugin for writing and reading them. Each checkpoint has its SHA-256 beside it, and
reading never unpickles code.
"""

import os
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from dpo.files import file_sha256, write_atomically

HASHED_KEY = "is_hashed"  # of checkpoints that were written with their hash; those of plain Lightning have none


class CheckpointWriteError(OSError):
    """A checkpoint could not be written."""


class AtomicCheckpointIO(CheckpointIO):
    """Writes checkpoints under a temporary name, flushes and renames them; reads only what hashes as it was written."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint and its hash.

        Raises:
            CheckpointWriteError: The file cannot be written; the message says how much space is free and which
                checkpoints are intact.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as temporary:
            try:
                torch.save({**checkpoint, HASHED_KEY: True}, temporary)
            except (OSError, RuntimeError) as error:  # torch raises either when the disk is full
                raise CheckpointWriteError(_write_error_message(path, error)) from error
            digest = file_sha256(temporary)
            # if the process is killed from here on, the new checkpoint has no hash rather than the old one's
            _digest_file(path).unlink(missing_ok=True)
        with write_atomically(_digest_file(path)) as temporary:
            temporary.write_text(digest + "\n")

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint with `read_checkpoint`, whatever `weights_only` says.

        Raises:
            ValueError: It is not a local file, its bytes are not those that were written, or it holds more than
                tensors and plain values.
        """
        return read_checkpoint(path, map_location)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint and its hash."""
        Path(path).unlink(missing_ok=True)
        _digest_file(Path(path)).unlink(missing_ok=True)


def generation_path(path: Path, age: int) -> Path:
    """Return the path of an older generation of a checkpoint: ``last.ckpt``, ``last-1.ckpt``, ``last-2.ckpt``, ..."""
    return path.with_name(f"{path.stem}-{age}{path.suffix}") if age else path


def rotate_generations(path: Path, keep: int) -> None:
    """Keep a checkpoint, which is about to be overwritten, as the generation before; drop those beyond `keep`."""
    for age in range(keep - 1, 0, -1):
        source, target = generation_path(path, age - 1), generation_path(path, age)
        if source.is_file():
            _digest_file(target).unlink(missing_ok=True)
            for old, new in ((source, target), (_digest_file(source), _digest_file(target))):
                if old.is_file():  # a second name of the same file: `path` itself is there all the time
                    temporary = new.with_name(f".{new.name}.link.tmp")
                    temporary.unlink(missing_ok=True)
                    os.link(old, temporary)
                    temporary.replace(new)


def newest_intact_checkpoint(path: Path) -> Path:
    """Return a checkpoint or, if it is damaged or missing, its newest intact generation; log what is passed over.

    Raises:
        ValueError: No generation is there, or none is intact.
    """
    generations = [path, *sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"))]
    for candidate in [each for each in generations if each.is_file()]:
        if problem := _damage(candidate):
            rank_zero_warn(f"{candidate} is passed over: {problem}.")
            continue
        if candidate != path:
            rank_zero_warn(f"the run goes on from {candidate}, the generation before.")
        return candidate
    return local_checkpoint(path)


def _damage(path: Path) -> str:
    digest = _digest_file(path)
    if digest.exists() and digest.read_text().strip() != file_sha256(path):
        return f"its SHA-256 is not the one in {digest.name}"
    return "" if is_zipfile(path) else "it is no checkpoint, or was cut off"


def read_checkpoint(path: str | Path, map_location: Any = None) -> dict[str, Any]:
    """Read a checkpoint after verifying its hash, without unpickling code.

    Args:
        path: A file on this machine.
        map_location: Device for the tensors. Default: the CPU.

    Raises:
        ValueError: It is not a local file, its bytes are not those that were written, or it holds more than tensors
            and plain values.
    """
    path = local_checkpoint(path)
    digest = _digest_file(path)
    if digest.exists() and digest.read_text().strip() != file_sha256(path):
        raise ValueError(
            f"{path} was changed or truncated after it was written: its SHA-256 is not the one in {digest.name}. "
            "Resume from another checkpoint."
        )
    try:
        loaded: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a checkpoint of tensors and plain values: {error}") from error
    if loaded.pop(HASHED_KEY, False) and not digest.exists():
        rank_zero_warn(
            f"{path} has no SHA-256 beside it ({digest.name}): damage since it was written cannot be noticed, and "
            "training may go on from wrong weights."
        )
    return loaded


def local_checkpoint(path: str | Path) -> Path:
    """Return the path of a checkpoint file that exists.

    Raises:
        ValueError: It is not a file on this machine.
    """
    if "://" in str(path) or not Path(path).is_file():
        hint = " The first validation of a run writes it." if Path(path).name == "best.ckpt" else ""
        raise ValueError(f"--ckpt_path: expected last, best or a checkpoint file on this machine, got {path}.{hint}")
    return Path(path)


def _write_error_message(path: Path, error: Exception) -> str:
    free = shutil.disk_usage(path.parent).free / 2**20
    intact = ", ".join(sorted(map(str, path.parent.glob("*.ckpt"))))
    return (
        f"the checkpoint {path} could not be written. Is the disk full? It has {free:,.0f} MiB free. ({error})\n"
        + (f"Intact checkpoints: {intact}. " if intact else "There is no earlier checkpoint. ")
        + f"Free some space and {'resume from one with --ckpt_path' if intact else 'start the run again'}."
    )


def _digest_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")

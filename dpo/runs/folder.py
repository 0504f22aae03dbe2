"""The folder of a run.

Takes a name, gives paths. Knows nothing of models or data.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

from dpo.files import remove, write_atomically

NAMED_CHECKPOINTS = ("last", "best")  # checkpoints of a run that need no path


@dataclass(frozen=True)
class Run:
    """Where everything of one run lies."""

    folder: Path

    @property
    def config_path(self) -> Path:
        """The resolved configuration."""
        return self.folder / "config.yaml"

    @property
    def audit_path(self) -> Path:
        """What was read, kept and refused of the data."""
        return self.folder / "audit.json"

    @property
    def metrics_path(self) -> Path:
        """One row per logged step."""
        return self.folder / "metrics.csv"

    @property
    def results_path(self) -> Path:
        """The last validation and test values."""
        return self.folder / "results.json"

    @property
    def samples_path(self) -> Path:
        """Answers of policy and reference at every validation."""
        return self.folder / "samples.jsonl"

    @property
    def predictions_path(self) -> Path:
        """Log-probabilities and rewards of every pair that was predicted."""
        return self.folder / "predictions.jsonl"

    @property
    def held_out_path(self) -> Path:
        """Some validation pairs as text."""
        return self.folder / "held_out.jsonl"

    @property
    def checkpoint_folder(self) -> Path:
        """Lightning checkpoints: last.ckpt, best.ckpt."""
        return self.folder / "checkpoints"

    @property
    def export_folder(self) -> Path:
        """The Hugging Face folder."""
        return self.folder / "export"

    def check_verb_allowed(self, verb: str, is_own_checkpoint: bool) -> None:
        """Let a verb into the folder.

        Args:
            verb: fit, validate, test or predict.
            own: It is about one of the checkpoints in it.

        Raises:
            ValueError: Another policy would be measured in the place of the one that was trained here.
        """
        if verb != "fit" and self.checkpoint_folder.exists() and not is_own_checkpoint:
            raise ValueError(
                f"--ckpt_path: expected last, best or another checkpoint of {self.folder}, which keeps what is found. "
                "To try the policy as it was before training, or another one, choose another --name."
            )

    @contextmanager
    def lock_folder(self, is_resuming: bool) -> Iterator[None]:
        """Make the folder and keep it for this process as long as it trains, however that ends.

        A start that breaks off before there is an audit (which is written when nothing can refuse any more) leaves no
        folder where there was none.

        Raises:
            ValueError: A run trains or has trained there, and this one does not go on from its checkpoint.
        """
        new = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.config_path.open("a") as kept:
            try:
                flock(kept, LOCK_EX | LOCK_NB)  # which the kernel takes back from a process that is killed
            except BlockingIOError as error:
                raise ValueError(f"another process trains in {self.folder}: choose another --name, or wait.") from error
            if (self.metrics_path.exists() or self.checkpoint_folder.exists()) and not is_resuming:
                raise ValueError(
                    f"the run {self.folder} exists. Choose another --name, remove the folder, or go on with it: "
                    f"--config {self.config_path} --ckpt_path {self.checkpoint_folder / 'last.ckpt'}"
                )
            for left in (
                *self.checkpoint_folder.glob(".*.tmp"),
                *self.folder.glob(f".{self.export_folder.name}.*.tmp"),
            ):
                remove(left)  # by a process that was killed while it wrote
            try:
                yield
            finally:
                if new and not self.audit_path.exists():
                    shutil.rmtree(self.folder)

    def link_as_latest(self) -> None:
        """Point `latest` at the folder."""
        latest = self.folder.parent / "latest"
        temporary = self.folder.parent / f".latest-{os.getpid()}"
        temporary.symlink_to(self.folder.name)
        temporary.replace(latest)

    def update_results(self, values: dict[str, float]) -> None:
        """Set values in results.json, leaving the others."""
        self.folder.mkdir(parents=True, exist_ok=True)
        before = json.loads(self.results_path.read_text()) if self.results_path.exists() else {}
        with write_atomically(self.results_path) as temporary:
            temporary.write_text(json.dumps({**before, **values}, indent=2) + "\n")


def checkpoint_run_name(root: Path, checkpoint: str | Path) -> str | None:
    """Name of the run below `root` that a checkpoint is of; the newest run for `last` and `best`."""
    folder = (root / "latest" if checkpoint in NAMED_CHECKPOINTS else Path(checkpoint).parents[1]).resolve()
    return folder.name if folder.parent == root.resolve() and folder.is_dir() else None

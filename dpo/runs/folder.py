"""The folder of a run: its paths, its lock, and the results file that every verb updates."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Any

import yaml

from dpo.files import remove, restore_replaced, write_atomically
from dpo.models.checkpoint_io import rotate_generations

NAMED_CHECKPOINTS = ("last", "best")  # --ckpt_path takes these names instead of a path
HOW_DATA_ARE_READ = ("batch_size", "max_tokens", "shuffle", "num_workers")  # options that change no mean of a metric


@dataclass(frozen=True)
class Run:
    """A run, given by its folder.

    Attributes:
        folder: The run's folder, ``<root>/<name>``; it need not exist yet.
    """

    folder: Path

    @property
    def config_path(self) -> Path:
        """Resolved configuration of the run, config.yaml."""
        return self.folder / "config.yaml"

    @property
    def audit_path(self) -> Path:
        """Counts of the rows that were read, kept and refused, audit.json."""
        return self.folder / "audit.json"

    @property
    def metrics_path(self) -> Path:
        """Metrics of every logged step, metrics.csv."""
        return self.folder / "metrics.csv"

    @property
    def results_path(self) -> Path:
        """Values of the last validation and test, results.json."""
        return self.folder / "results.json"

    @property
    def samples_path(self) -> Path:
        """Answers of policy and reference at every validation, samples.jsonl."""
        return self.folder / "samples.jsonl"

    @property
    def report_path(self) -> Path:
        """Page that says what the run has learned, report.html."""
        return self.folder / "report.html"

    @property
    def ledger_path(self) -> Path:
        """Folder of Parquet files with the values of single pairs, ledger.parquet; see `dpo.runs.ledger`."""
        return self.folder / "ledger.parquet"

    @property
    def predictions_path(self) -> Path:
        """Default output of predict, predictions.jsonl."""
        return self.folder / "predictions.jsonl"

    @property
    def held_out_path(self) -> Path:
        """Some validation pairs as text, held_out.jsonl."""
        return self.folder / "held_out.jsonl"

    @property
    def evaluations_folder(self) -> Path:
        """Records of what the policy scored on benchmarks, evaluations."""
        return self.folder / "evaluations"

    @property
    def checkpoint_folder(self) -> Path:
        """Folder of the Lightning checkpoints last.ckpt and best.ckpt."""
        return self.folder / "checkpoints"

    @property
    def export_folder(self) -> Path:
        """Hugging Face folder with the trained policy."""
        return self.folder / "export"

    def check_verb_allowed(self, verb: str, is_own_checkpoint: bool) -> None:
        """Refuse to store measurements of another policy among those of the policy that was trained here.

        Args:
            verb: fit, validate, test or predict.
            is_own_checkpoint: Whether the verb uses one of this run's checkpoints.

        Raises:
            ValueError: The run has checkpoints, and the verb measures a policy that is none of them.
        """
        if verb != "fit" and self.checkpoint_folder.exists() and not is_own_checkpoint:
            raise ValueError(
                f"--ckpt_path: expected last, best or another checkpoint of {self.folder}, where the results are "
                "stored. To measure the policy before training, or another policy, choose another --name."
            )

    @contextmanager
    def lock_folder(self, is_resuming: bool, may_restart: bool = False) -> Iterator[None]:
        """Create the folder and lock it for this process until the block ends.

        If the block ends before audit.json is written (when nothing can refuse the run any more), a folder that was
        created here is removed again.

        Args:
            is_resuming: Whether the run continues from one of its own checkpoints.
            may_restart: Whether a run without any checkpoint begins again; what it has left is removed.

        Raises:
            ValueError: Another process trains in the folder, or a run has trained there and is not being resumed.
        """
        is_new = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.config_path.open("a") as lock_file:
            try:
                flock(lock_file, LOCK_EX | LOCK_NB)  # the kernel releases it even if the process is killed
            except BlockingIOError as error:
                raise ValueError(f"another process trains in {self.folder}: choose another --name, or wait.") from error
            if (self.metrics_path.exists() or self.checkpoint_folder.exists()) and not is_resuming:
                self._require_restart(may_restart)
            self._remove_partial_writes()
            try:
                yield
            finally:
                if is_new and not self.audit_path.exists():
                    shutil.rmtree(self.folder)

    def _require_restart(self, may_restart: bool) -> None:
        has_checkpoint = any(self.checkpoint_folder.glob("*.ckpt"))
        if may_restart and not has_checkpoint:
            for path in (self.metrics_path, self.samples_path, self.ledger_path, self.checkpoint_folder):
                remove(path)
            return
        way_on = (
            f"resume the run with --config {self.config_path} --ckpt_path {self.checkpoint_folder / 'last.ckpt'}"
            if has_checkpoint
            else f"begin it again, as it has no checkpoint, with --name {self.folder.name} --ckpt_path auto"
        )
        raise ValueError(f"the run {self.folder} exists: choose another --name, remove the folder, or {way_on}")

    def _remove_partial_writes(self) -> None:
        """Remove what a process that was killed while writing a checkpoint or an export has left behind."""
        restore_replaced(self.export_folder)
        for path in (*self.checkpoint_folder.glob(".*.tmp"), *self.folder.glob(f".{self.export_folder.name}.*.tmp")):
            remove(path)

    def rotate_last_checkpoint(self, keep: int) -> None:
        """Keep last.ckpt, which is about to be overwritten, as an older generation; at most `keep` in all."""
        rotate_generations(self.checkpoint_folder / "last.ckpt", keep)

    def link_as_latest(self) -> None:
        """Point the symbolic link ``latest``, beside the folder, at this run."""
        latest = self.folder.parent / "latest"
        temporary = self.folder.parent / f".latest-{os.getpid()}"
        temporary.symlink_to(self.folder.name)
        temporary.replace(latest)

    def other_data(self, config_text: str) -> str:
        """Return by which options the data of a configuration differ from the run's own, or nothing.

        A folder without a configuration gets this one: its first data are its own.

        Args:
            config_text: The configuration as YAML, with all defaults.
        """
        if not self.config_path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with write_atomically(self.config_path) as temporary:
                temporary.write_text(config_text)
        own, given = _data_options(self.config_path.read_text()), _data_options(config_text)
        names = [name for name in given if own.get(name) != given[name] and name not in HOW_DATA_ARE_READ]
        return ", ".join(f"{name}={given[name]}" for name in names)

    def update_results(self, values: Mapping[str, Any]) -> None:
        """Set values in results.json and keep its others."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stored = json.loads(self.results_path.read_text()) if self.results_path.exists() else {}
        with write_atomically(self.results_path) as temporary:
            temporary.write_text(json.dumps({**stored, **values}, indent=2) + "\n")


def _data_options(config_text: str) -> dict[str, Any]:
    """Return the class of the data and its options that decide which pairs are measured."""
    data = (yaml.safe_load(config_text) or {}).get("data") or {}
    return {"class": data.get("class_path"), **(data.get("init_args") or {})}


def checkpoint_run_name(root: Path, checkpoint: str | Path) -> str | None:
    """Return the name of the run that a checkpoint belongs to.

    Args:
        root: Folder of all runs.
        checkpoint: Path of a checkpoint, or ``last`` or ``best`` for one of the newest run.

    Returns:
        The name, or None if the checkpoint is of no run below `root`.
    """
    path = root / "latest" if checkpoint in NAMED_CHECKPOINTS else Path(checkpoint).absolute().parent.parent
    folder = path.resolve()
    return folder.name if folder.parent == root.resolve() and folder.is_dir() else None


def run_of_export(folder: str) -> Run:
    """Return the run that an export belongs to; for any other model folder, a run with that folder."""
    path = Path(folder)
    return Run(path.resolve().parent if (path / "train_config.yaml").is_file() else path)

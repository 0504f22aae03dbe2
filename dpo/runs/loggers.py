"""Where metrics go: metrics.csv always, Weights & Biases online or offline.

Takes names and values at a step. Knows nothing of what they mean.
"""

import csv
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from dpo.files import write_atomically
from dpo.runs.folder import Run


class MetricsCSV(Logger):
    """A file with one row per step: `step`, then every metric in the order of its first appearance."""

    def __init__(self, path: Path) -> None:
        """Log into this file."""
        super().__init__()
        self.path = path
        self.columns = ["step"]
        self.last_row: dict[str, Any] = {}  # the newest row, and where it begins in the file
        self.last_row_offset = 0

    @property
    def name(self) -> str:
        """Of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """Unused: the run has a name."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder of the run."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration lies beside the file."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add values to the row of a step, in any number of calls.

        An earlier step than the newest is that one: Lightning's own callbacks count from 0 what we count from 1.
        """
        assert step is not None
        step = max(step, self.last_row.get("step", 0))
        if self.last_row.get("step") != step:
            self.last_row_offset = self.path.stat().st_size if self.path.exists() else 0
            self.last_row = {"step": step}
        self.last_row |= metrics
        new = [name for name in metrics if name not in self.columns]
        if new or not self.last_row_offset:
            self.columns += new
            self._rewrite([row for row in read_metrics(self.path) if int(row["step"]) < step])
        with self.path.open("r+", newline="") as file:
            file.truncate(self.last_row_offset)
            file.seek(self.last_row_offset)
            csv.DictWriter(file, self.columns).writerow(self.last_row)

    @rank_zero_only
    def rewind_to_step(self, step: int) -> None:
        """Go on behind a step: later rows are of steps that are taken again."""
        rows: list[dict[str, Any]] = [{**row, "step": int(row["step"])} for row in read_metrics(self.path)]
        kept = [row for row in rows if row["step"] <= step]
        if rows:
            self.columns = list(rows[0])
            self._rewrite(kept[:-1])
        if kept:
            self.last_row = kept[-1]
            self.log_metrics({}, self.last_row["step"])

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        with write_atomically(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        self.last_row_offset = self.path.stat().st_size


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def wandb_logger(run: Run) -> WandbLogger:
    """Online where a key is set or the user is logged in, otherwise offline; WANDB_MODE decides where it is set."""
    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
    if mode == "offline":
        rank_zero_info(
            f"Weights & Biases is offline; to upload the curves later: wandb sync {run.folder / 'wandb'}/offline-run-*"
        )
    quiet = wandb.Settings(silent=mode == "offline", console="off")
    logger = WandbLogger(name=run.folder.name, project="dpo", save_dir=run.folder, mode=mode, settings=quiet)
    logger._wandb_init.pop("anonymous")  # Lightning passes it on, and wandb remarks that it does nothing
    return logger

"""The logger of every run, metrics.csv.

Lightning's own CSVLogger writes a row per call and deletes the file of a run that resumes; `MetricsCSV` joins the calls
of a step in one row and continues the file.
"""

import csv
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from dpo.files import explained_errors, write_atomically

PLACE_COLUMNS = ("step", "epoch", "seconds")  # where a row stands, whatever was measured there


class RunLogger(Logger):
    """Base of the loggers of a run, whose folder already has a name."""

    @property
    def name(self) -> str:
        """Empty: Lightning makes it a part of the path of what it writes into the run's folder, such as checkpoints."""
        return ""

    @property
    def version(self) -> str:
        """Empty: the run's folder already has a name of its own."""
        return ""


class MetricsCSV(RunLogger):
    """A CSV file with one row per step: `step`, then every metric in the order of its first appearance.

    Attributes:
        row_beginning: Returns what every new row holds beside its step.
    """

    row_beginning: Callable[[], Mapping[str, float]]

    def __init__(self, path: Path) -> None:
        """Log to the file at `path`."""
        super().__init__()
        self.path = path
        self.columns = ["step"]
        self.last_row: dict[str, Any] = {}
        self.last_row_offset = 0  # bytes; where the last row begins in the file
        self.row_beginning = dict

    @property
    def save_dir(self) -> str:
        """Folder of the run."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration is in config.yaml beside the file."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add values to the row of a step; a step may be logged in several calls.

        A step before the last row's is taken as the last row's: Lightning's own callbacks count steps from 0, the
        stages from 1.
        """
        assert step is not None
        step = max(step, self.last_row.get("step", 0))
        if self.last_row.get("step") != step:
            self.last_row_offset = self.path.stat().st_size if self.path.exists() else 0
            self.last_row = {"step": step, **self.row_beginning()}
        self.last_row |= metrics
        new_columns = [name for name in self.last_row if name not in self.columns]
        if new_columns or not self.last_row_offset:
            self.columns += new_columns
            self._rewrite([row for row in read_metrics(self.path) if int(row["step"]) < step])
        with explained_errors(self.path), self.path.open("r+", newline="") as file:
            file.truncate(self.last_row_offset)
            file.seek(self.last_row_offset)
            csv.DictWriter(file, self.columns).writerow(self.last_row)

    @rank_zero_only
    def rewind_to_step(self, step: int, drop_prefix: str = "") -> None:
        """Remove all rows after a step, so that these steps can be logged again.

        Args:
            step: The last step to keep.
            drop_prefix: Metrics of that step that are removed too, by the beginning of their names. Empty: none.
        """
        rows = read_metrics(self.path)
        kept_rows = [row for row in rows if int(row["step"]) <= step]
        if drop_prefix and kept_rows and int(kept_rows[-1]["step"]) == step:
            last = {name: "" if name.startswith(drop_prefix) else value for name, value in kept_rows.pop().items()}
            kept_rows += [last] if any(value for name, value in last.items() if name not in PLACE_COLUMNS) else []
        if rows:
            self.columns = list(rows[0])
            self._rewrite(kept_rows[:-1])
        if kept_rows:
            self.last_row = {**kept_rows[-1], "step": int(kept_rows[-1]["step"])}
            self.log_metrics({}, self.last_row["step"])

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with write_atomically(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        self.last_row_offset = self.path.stat().st_size


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Return the rows of a metrics.csv, or no rows if the file does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))

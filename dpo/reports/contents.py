"""What a run has left, read once for its report: metrics, results, audit, configuration, samples, ledger."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from dpo.reports.pair_values import PairLedger
from dpo.runs.folder import Run
from dpo.runs.inventory import read_audit, read_inventory
from dpo.runs.loggers import read_metrics

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class RunContents:
    """The files of a run as values; what is missing is empty.

    Attributes:
        run: The run.
        metrics: Columns of metrics.csv by name, nan where nothing was logged.
        results: Values of results.json.
        audit: Counts of audit.json, by split and subset.
        inventory: What the run has loaded, of audit.json.
        config: Options of config.yaml.
        config_text: The text of config.yaml.
        samples: Rows of samples.jsonl.
        held_out: Rows of held_out.jsonl.
        ledger: Measurements of single pairs; None if the run has none.
    """

    run: Run
    metrics: dict[str, Numbers]
    results: dict[str, float]
    audit: dict[str, Any]
    inventory: dict[str, Any]
    config: dict[str, Any]
    config_text: str
    samples: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    ledger: PairLedger | None

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return self.run.folder.resolve().name

    def curve_of(self, metric: str) -> tuple[Numbers, Numbers]:
        """Return the steps at which a metric was logged, and its values."""
        values = self.metrics.get(metric, np.empty(0))
        is_logged = ~np.isnan(values)
        return (self.metrics["step"][is_logged], values[is_logged]) if len(values) else (values, values)

    def final_value(self, metric: str) -> float:
        """Return the last logged value of a metric, nan if there is none."""
        _, values = self.curve_of(metric)
        return float(values[-1]) if len(values) else float("nan")

    def option(self, path: str) -> Any:
        """Return an option of config.yaml by its dotted path, None if it is not there."""
        value: Any = self.config
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @property
    def loss_name(self) -> str:
        """Class of the loss, such as ``DPO``; empty if the configuration does not say."""
        return str(self.option("model.init_args.loss.class_path") or "").rpartition(".")[2]

    def pairs_by_validation(self) -> int | None:
        """Return about how many pairs a validation measured, from the audit; None if that cannot be known."""
        kept = (self.audit.get("train") or {}).get("total", {}).get("kept")
        share = self.option("data.init_args.val_fraction")
        is_cut = self.option("trainer.limit_val_batches") not in (None, 1.0)
        limit = self.option("data.init_args.limit")
        if is_cut or not kept or not share:
            return None
        count: int = round(min(kept, limit or kept) * share)
        return count


def read_contents(run: Run) -> RunContents:
    """Read the files of a run.

    Raises:
        ValueError: The folder is not that of a run that has trained, or a file of it cannot be read.
    """
    if not run.metrics_path.is_file():
        raise ValueError(f"{run.folder}: expected the folder of a run, with metrics.csv, and found none.")
    try:
        config_text = _read_text(run.config_path)
        return RunContents(
            run=run,
            metrics=_metric_columns(run.metrics_path),
            results=json.loads(_read_text(run.results_path) or "{}"),
            audit=read_audit(run),
            inventory=read_inventory(run),
            config=yaml.safe_load(config_text) or {},
            config_text=config_text,
            samples=list(_json_lines(run.samples_path)),
            held_out=list(_json_lines(run.held_out_path)),
            ledger=PairLedger.of_run(run),
        )
    except (ValueError, KeyError, yaml.YAMLError) as error:
        raise ValueError(f"{run.folder}: a file of the run cannot be read: {' '.join(str(error).split())}") from error


def _metric_columns(path: Path) -> dict[str, Numbers]:
    rows = read_metrics(path)
    names = list(rows[0]) if rows else ["step"]
    return {name: np.array([float(row.get(name) or "nan") for row in rows]) for name in names}


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON Lines file; a text may contain other line separators than that of the file."""
    for line in _read_text(path).split("\n"):
        if line:
            yield json.loads(line)


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""

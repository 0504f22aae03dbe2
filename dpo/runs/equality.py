"""Whether two runs are the same to the bit: their checkpoints, metrics, ledgers, samples, results and exports."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo.files import file_sha256
from dpo.models.checkpoint_io import read_checkpoint
from dpo.runs.folder import Run
from dpo.runs.ledger import VALUE_COLUMNS, read_ledger
from dpo.runs.loggers import read_metrics

# What a clock says differs between any two runs.
CLOCK_METRICS = {"seconds", "train/tokens_per_second", "train/time/step", "train/time/data"}
UNCOMPARED_STATES = {"training_seconds", "hyper_parameters"}  # of a checkpoint: a clock, and what the user has chosen
DATED_FILES = {"README.md", "train_config.yaml"}  # of an export: they name the run and the day
_CHECKPOINT_PARTS = {"state_dict": "weights", "optimizer_states": "optimizer", "lr_schedulers": "schedule"}
Values = dict[str, Any]
"""Tensors, numbers and texts of a part of a run, by name."""


@dataclass(frozen=True)
class PartComparison:
    """What the comparison of a part of two runs has found.

    Attributes:
        part: The part in words, such as ``weights``.
        compared: Number of values that either run has: tensors, cells, texts.
        difference: Largest absolute difference of two numbers; NaN if one of them is.
        differing: Names of the values that differ or that only one run has.
    """

    part: str
    compared: int
    difference: float
    differing: Sequence[str]


def compare_runs(expected: Run, found: Run) -> list[PartComparison]:
    """Compare everything that two finished runs have left; parts that neither has are left out."""
    parts, others = _parts(expected), _parts(found)
    compared = [compare_values(name, parts.get(name, {}), others.get(name, {})) for name in {**parts, **others}]
    return [part for part in compared if part.compared]


def compare_values(part: str, expected: Values, found: Values) -> PartComparison:
    """Compare the values of a part by name; NaN equals NaN."""
    names = {**expected, **found}
    differences = {
        name: _difference(expected[name], found[name]) if name in expected and name in found else math.nan
        for name in names
    }
    numbers = [value for value in differences.values() if value is not None]
    largest = max(numbers, key=lambda number: math.inf if math.isnan(number) else number, default=0.0)
    return PartComparison(part, len(names), largest, [name for name, value in differences.items() if value is not None])


def _difference(expected: Any, found: Any) -> float | None:
    """Return None if two values are the same, and otherwise by how much they differ; NaN where that is no number."""
    if isinstance(expected, Tensor) and isinstance(found, Tensor):
        same_kind = expected.dtype == found.dtype and expected.shape == found.shape
        if same_kind and _bits_equal(expected, found):
            return None
        return (expected.double() - found.double()).abs().max().item() if same_kind else math.nan
    if isinstance(expected, Tensor) or isinstance(found, Tensor):
        return math.nan
    if expected == found or (expected != expected and found != found):
        return None
    is_number = isinstance(expected, int | float) and isinstance(found, int | float)
    return abs(expected - found) if is_number else math.nan


def _bits_equal(expected: Tensor, found: Tensor) -> bool:
    return torch.equal(expected.contiguous().view(-1).view(torch.uint8), found.contiguous().view(-1).view(torch.uint8))


def _parts(run: Run) -> dict[str, Values]:
    checkpoint = read_checkpoint(run.checkpoint_folder / "last.ckpt")
    parts = {name: dict(_leaves(checkpoint.pop(key, {}))) for key, name in _CHECKPOINT_PARTS.items()}
    rest = {key: value for key, value in checkpoint.items() if key not in UNCOMPARED_STATES}
    return parts | {
        "rest of the checkpoint": dict(_leaves(rest)),
        "rows of metrics.csv": _metric_cells(run),
        "ledger": _ledger_cells(run),
        "samples": dict(_leaves(_json_lines(run.samples_path))),
        "results.json": dict(_leaves(_json_lines(run.results_path, whole=True))),
        "export (SHA-256)": _export_hashes(run.export_folder),
    }


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values in nested mappings and lists, each with its path."""
    if isinstance(value, Mapping):
        items = [*value.items()]
    elif isinstance(value, list | tuple):
        items = [*enumerate(value)]
    else:
        yield name, value
        return
    for key, inner in items:
        yield from _leaves(inner, f"{name}.{key}" if name else str(key))


def _metric_cells(run: Run) -> Values:
    return {
        f"step {row['step']}, {name}": float(cell)
        for row in read_metrics(run.metrics_path)
        for name, cell in row.items()
        if cell and name not in CLOCK_METRICS
    }


def _ledger_cells(run: Run) -> Values:
    if not run.ledger_path.is_dir():
        return {}
    return {
        f"step {row['step']}, {row['split']} pair {row['id']}{', trained' if row['trained'] else ''}, {name}": row[name]
        for row in read_ledger(run).to_pylist()
        for name in VALUE_COLUMNS
    }


def _json_lines(path: Path, whole: bool = False) -> list[Any]:
    """Return the rows of a JSON Lines file, or the one value of a JSON file; nothing if it does not exist."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in ([text] if whole else text.split("\n")) if line]


def _export_hashes(folder: Path) -> Values:
    files = sorted(folder.glob("*")) if folder.is_dir() else []
    return {file.name: file_sha256(file) for file in files if file.name not in DATED_FILES}

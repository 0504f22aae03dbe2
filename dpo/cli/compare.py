"""`python -m dpo compare runs/a runs/b`: the options in which runs differ, and what came of them, in one table."""

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table

from dpo.runs.folder import Run
from dpo.runs.loggers import read_metrics
from dpo.runs.results import TableRows

IGNORED_OPTIONS = {"name", "trainer.default_root_dir", "ckpt_path"}  # every run has its own
UNREADABLE = "unreadable"
WHOLE_NUMBERS = {"steps", "best at step", "tokens/s (median)"}
VALIDATION_VALUES = {
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "perplexity": "perplexity",  # of supervised fine-tuning
}
_CELL_PADDING = 3  # characters of a column beyond its text: a space on both sides and a line


@dataclass(frozen=True)
class RunSummary:
    """What a run's folder says of it.

    Attributes:
        folder: The run's folder, as it was given.
        state: `finished`, `stopped` (before the last planned step), `unfinished` or `unreadable`.
        options: Options by dotted name; empty if they could not be read.
        values: Results by name: steps, losses, accuracy, margin, test values, tokens per second.
        remark: Why it is not finished; empty if it is.
    """

    folder: str
    state: str
    options: Mapping[str, Any]
    values: Mapping[str, float]
    remark: str = ""


def summarize_run(folder: Path) -> RunSummary:
    """Read a run's folder; whatever is missing or broken is said in the state of the summary."""
    run = Run(folder)
    try:
        if not folder.is_dir():
            raise ValueError("there is no such folder")
        if not run.config_path.is_file():
            raise ValueError("no config.yaml: not the folder of a run")
        options = dict(flatten_options(yaml.safe_load(run.config_path.read_text(encoding="utf-8"))))
        values = dict(_result_values(run))
    except (ValueError, OSError, KeyError, TypeError, yaml.YAMLError) as error:
        return RunSummary(str(folder), UNREADABLE, {}, {}, " ".join(str(error).split()))
    state, remark = _state_and_remark(run, options, values)
    return RunSummary(str(folder), state, options, values, remark)


def flatten_options(options: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield options by dotted names, classes by the names of their options: `model.loss`, `model.loss.beta`."""
    if isinstance(options, dict) and "class_path" in options:
        yield prefix, str(options["class_path"]).rpartition(".")[2]
        options = options.get("init_args") or {}
    elif not isinstance(options, dict) or (prefix and not options):
        yield prefix, options
        return
    for name, value in options.items():
        yield from flatten_options(value, f"{prefix}.{name}" if prefix else str(name))


def _result_values(run: Run) -> Iterator[tuple[str, float]]:
    rows = read_metrics(run.metrics_path)
    if rows:
        yield "steps", float(rows[-1]["step"])
    yield from _validation_values([row for row in rows if row.get("val/loss")])
    stored = json.loads(run.results_path.read_text(encoding="utf-8")) if run.results_path.is_file() else {}
    for name, title in {"loss": "loss", **VALIDATION_VALUES}.items():
        if f"test/{name}" in stored:
            yield f"test {title}", float(stored[f"test/{name}"])
    rates = [float(row["train/tokens_per_second"]) for row in rows if row.get("train/tokens_per_second")]
    if rates:
        yield "tokens/s (median)", statistics.median(rates)


def _validation_values(rows: Sequence[Mapping[str, str]]) -> Iterator[tuple[str, float]]:
    if not rows:
        return
    best = min(rows, key=lambda row: _rank(float(row["val/loss"])))
    yield "last validation loss", float(rows[-1]["val/loss"])
    yield "best validation loss", float(best["val/loss"])
    yield "best at step", float(best["step"])
    for name, title in VALIDATION_VALUES.items():
        if rows[-1].get(f"val/{name}"):
            yield title, float(rows[-1][f"val/{name}"])


def _rank(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


def _state_and_remark(run: Run, options: Mapping[str, Any], values: Mapping[str, float]) -> tuple[str, str]:
    steps, planned = int(values.get("steps", 0)), options.get("trainer.max_steps") or -1
    if not run.export_folder.is_dir():  # written after the last step, whatever ended the run
        return "unfinished", f"still training, or killed: there is no export, and the last logged step is {steps}"
    if steps < planned:
        return "stopped", f"ended at step {steps} of {planned}"
    return "finished", ""


def differing_options(runs: Sequence[RunSummary]) -> list[str]:
    """Return the names of the options in which the readable runs differ."""
    read = [run.options for run in runs if run.state != UNREADABLE]
    names = dict.fromkeys(name for options in read for name in options if name not in IGNORED_OPTIONS)
    return [name for name in names if any(options.get(name) != read[0].get(name) for options in read)]


def comparison_table(runs: Sequence[RunSummary]) -> TableRows:
    """Return a table with a column per run: its state, the options that differ, and its results."""
    titles = dict.fromkeys(name for run in runs for name in run.values)
    rows: TableRows = [("", *(run.folder for run in runs)), ("state", *(run.state for run in runs))]
    rows += [(name, *(_option_text(run, name) for run in runs)) for name in differing_options(runs)]
    rows += [(name, *(_value_text(name, run.values.get(name)) for run in runs)) for name in titles]
    return rows


def _option_text(run: RunSummary, name: str) -> str:
    value = run.options.get(name, "-")
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _value_text(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if name in WHOLE_NUMBERS and math.isfinite(value) else f"{value:.5g}"


def print_comparison(rows: TableRows, console: Console) -> None:
    """Print the table; runs that do not fit beside each other follow in further tables below."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(cell_len, column)) + _CELL_PADDING for column in columns]
    start = 1
    while start < len(columns):
        end, width = start + 1, widths[0] + widths[start] + 1
        while end < len(columns) and width + widths[end] <= console.width:
            width += widths[end]
            end += 1
        table = Table(*(Column(column[0], overflow="fold") for column in [columns[0], *columns[start:end]]))
        for row in rows[1:]:
            table.add_row(row[0], *row[start:end])
        console.print(table, markup=False)
        start = end


def markdown_comparison(rows: TableRows) -> str:
    """Return the table in Markdown."""
    lines = [rows[0], ["---"] + ["---:"] * (len(rows[0]) - 1), *rows[1:]]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def json_comparison(runs: Sequence[RunSummary]) -> str:
    """Return the runs as JSON: state, the options that differ, and results; numbers that are not finite are null."""
    names = differing_options(runs)
    content = [
        {
            "run": run.folder,
            "state": run.state,
            "remark": run.remark,
            "options": {name: run.options[name] for name in names if name in run.options},
            "results": {name: value if math.isfinite(value) else None for name, value in run.values.items()},
        }
        for run in runs
    ]
    return json.dumps(content, indent=2, default=str)


def main(arguments: Sequence[str]) -> None:
    """Print the comparison.

    Raises:
        ValueError: Some of the runs could not be read; the others have been printed by then.
    """
    parser = argparse.ArgumentParser(
        "python -m dpo compare",
        description="Print a table of runs: the options that differ between them, and their results.",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, such as runs/first runs/second")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    form.add_argument("--json", action="store_true", help="print all values in full, as JSON")
    options = parser.parse_args(arguments)
    runs = [summarize_run(folder) for folder in options.runs]
    remarks = [f"{run.folder} is {run.state}: {run.remark}." for run in runs if run.remark]
    if options.json:
        print(json_comparison(runs))
    elif options.markdown:
        print(markdown_comparison(comparison_table(runs)), *remarks, sep="\n")
    else:
        print_comparison(comparison_table(runs), Console())
        print(*remarks, sep="\n", end="\n" if remarks else "")
    if any(run.state == UNREADABLE for run in runs):
        raise ValueError(f"{sum(run.state == UNREADABLE for run in runs)} of {len(runs)} runs could not be read.")

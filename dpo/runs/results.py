"""The table of a run's results as text, Markdown and CSV, and a run's files as JSON values for the server."""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.box import ASCII, HEAVY_HEAD, Box
from rich.console import Console
from rich.table import Column, Table

from dpo.files import write_atomically
from dpo.runs.folder import Run
from dpo.runs.loggers import read_metrics

TABLE_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "perplexity",  # only supervised fine-tuning logs it
)
CLOCK_COLUMNS = ("epoch", "seconds")  # of metrics.csv; no metrics
MAX_METRIC_ROWS = 500  # most rows of metrics.csv that `read_artifacts` returns
TableRows = list[tuple[str, ...]]
"""A table as text; the first row is the header."""


def results_table(metrics_path: Path) -> TableRows:
    """Return the table of results from a metrics.csv.

    Its columns are the step, the training loss at the last logged step up to there, the validation loss, and those
    `TABLE_METRICS` that were logged. It has a row per validation, or, without validations, per logged training step.
    """
    rows = read_metrics(metrics_path)
    stage = "val" if any(row.get("val/loss") for row in rows) else "train"
    names = [name for name in TABLE_METRICS if any(row.get(f"{stage}/{name}") for row in rows)]
    table: TableRows = [("step", "training loss", "validation loss", *names)]
    training_loss = ""
    for row in rows:
        training_loss = row.get("train/loss") or training_loss
        if row[f"{stage}/loss"]:
            losses = (training_loss, row.get("val/loss", ""))
            table.append((row["step"], *losses, *(row[f"{stage}/{name}"] for name in names)))
    return table


def write_results(run: Run) -> TableRows:
    """Write results.csv and results.md from a run's metrics.csv.

    Returns:
        The table in them.
    """
    rows = results_table(run.metrics_path)
    with write_atomically(run.folder / "results.csv") as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    with write_atomically(run.folder / "results.md") as temporary:
        temporary.write_text(results_markdown(run.metrics_path))
    return rows


def results_markdown(metrics_path: Path) -> str:
    """Return the table of results in Markdown, followed by its remarks."""
    remarks = [f"{remark}\n" for remark in results_remarks(metrics_path)]
    return "\n".join([markdown_table(results_table(metrics_path)), *remarks])


def results_remarks(metrics_path: Path) -> Iterator[str]:
    """Yield what the table does not show: steps after the last validation, and steps at which all pairs are ties."""
    rows = read_metrics(metrics_path)
    validated_steps = [row["step"] for row in rows if row.get("val/loss")]
    if validated_steps and validated_steps[-1] != rows[-1]["step"]:
        yield f"The last validation was at step {validated_steps[-1]}, the policy is that of step {rows[-1]['step']}."
    stage = "val" if validated_steps else "train"
    for row in rows:
        values = [row.get(f"{stage}/rewards/{name}", "") for name in ("accuracies", "margins")]
        if all(values) and not any(map(float, values)):
            yield f"At step {row['step']} policy and reference are equal: every pair is a tie, and counts as 0."


def markdown_table(rows: TableRows) -> str:
    """Return a table in Markdown, with numbers to four decimal places (see `to_four_places`)."""
    header, *values = rows
    lines = [header, ["---:"] * len(header), *map(_rounded, values)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def print_results(rows: TableRows, title: str, remarks: Iterable[str] = ()) -> None:
    """Print the newest rows of a table and remarks below it; on a narrow terminal, rows become columns."""
    console = Console()
    header, *values = rows
    printed = [header, *map(_rounded, values[-20:])]
    if console.width < 185:  # characters; less does not fit a column for every metric
        printed = list(zip(header, *printed[1:][-4:], strict=True))
    columns = (Column(name, justify="right", no_wrap=True) for name in printed[0])
    table = Table(*columns, title=title, box=frame_of(console))
    for row in printed[1:]:
        table.add_row(*row)
    console.print(table, *remarks, sep="\n")


def print_metric_values(values: Mapping[str, float], stage: str) -> None:
    """Print the metrics of a validation or test, one a line.

    Args:
        values: Values by metric name; those of other stages are left out.
        stage: ``val`` or ``test``, the prefix of the names.
    """
    title = f"Results of the {'validation' if stage == 'val' else stage} pairs"
    console = Console()
    table = Table("metric", Column("value", justify="right"), title=title, box=frame_of(console))
    for name, value in values.items():
        if name.startswith(f"{stage}/"):
            table.add_row(name, to_four_places(value))
    console.print(table)


def frame_of(console: Console) -> Box:
    """Return the frame of tables: lines on a terminal, and characters that every editor shows in a file."""
    return HEAVY_HEAD if console.is_terminal else ASCII


def to_four_places(value: float) -> str:
    """Return a number with four decimal places, or, where these would all be 0, in scientific notation."""
    return f"{value:.2e}" if 0 < abs(value) < 5e-5 else f"{value:.4f}"


def _rounded(row: tuple[str, ...]) -> tuple[str, ...]:
    return row[0], *(to_four_places(float(value)) if value else "" for value in row[1:])


def read_artifacts(run: Run) -> dict[str, Any]:
    """Return the contents of a run's files as JSON values; what is missing is empty.

    Numbers that are not finite become None. If there are more than `MAX_METRIC_ROWS` metrics rows, only every n-th is
    returned.
    """
    header, *rows = csv.reader(_read_text(run.folder / "results.csv").splitlines() or [""])
    metrics = [
        {name: value for name, value in row.items() if name not in CLOCK_COLUMNS}
        for row in read_metrics(run.metrics_path)
    ]
    stride = math.ceil(len(metrics) / MAX_METRIC_ROWS) or 1
    return {
        "name": run.folder.name,
        "results": {"header": header, "rows": rows},
        "metrics": [_finite_numbers(row) for row in metrics[::stride]],
        "values": _finite_numbers(result_values(run)),
        # split("\n"), not splitlines(): dialogues may contain other line separators, such as U+2028.
        "held_out": [json.loads(line) for line in _read_text(run.held_out_path).split("\n") if line],
        "config": _read_text(run.config_path),
    }


def result_values(run: Run) -> dict[str, float]:
    """Return the single numbers of results.json, by name of the metric; nothing if there is no such file."""
    stored = json.loads(_read_text(run.results_path) or "{}")
    return {name: value for name, value in stored.items() if isinstance(value, int | float)}


def _read_text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _finite_numbers(row: Mapping[str, Any]) -> dict[str, float | None]:
    numbers = {name: float("nan" if value in ("", None) else value) for name, value in row.items()}
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}

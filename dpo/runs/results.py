"""The table of results: what training and validation gave at every validation, as text, Markdown and CSV.

Takes the rows of metrics.csv, and gives back all that a run has left. Knows nothing of how it was made.
"""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

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
    "perplexity",  # of a supervised stage
)
MAX_METRIC_ROWS = 500  # rows of metrics.csv
TableRows = list[tuple[str, ...]]  # the first is the header


def results_table(metrics_path: Path) -> TableRows:
    """A header and one row per validation: step, training loss, validation loss, then those `METRICS` that there are.

    The training loss is that of the last logged step before. Without validations, the logged training steps.
    """
    rows = read_metrics(metrics_path)
    stage = "val" if any(row.get("val/loss") for row in rows) else "train"
    names = [name for name in TABLE_METRICS if any(row.get(f"{stage}/{name}") for row in rows)]
    table: TableRows = [("step", "training loss", "validation loss", *names)]
    loss = ""
    for row in rows:
        loss = row.get("train/loss") or loss
        if row[f"{stage}/loss"]:
            validation = row["val/loss"] if stage == "val" else ""
            table.append((row["step"], loss, validation, *(row[f"{stage}/{name}"] for name in names)))
    return table


def write_results(run: Run) -> TableRows:
    """Write results.csv and results.md into a run, from its metrics.csv."""
    rows = results_table(run.metrics_path)
    with write_atomically(run.folder / "results.csv") as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    with write_atomically(run.folder / "results.md") as temporary:
        temporary.write_text(results_markdown(run.metrics_path))
    return rows


def results_markdown(metrics_path: Path) -> str:
    """The table in Markdown with its remarks."""
    return "\n".join(
        [markdown_table(results_table(metrics_path)), *(f"{remark}\n" for remark in results_remarks(metrics_path))]
    )


def results_remarks(metrics_path: Path) -> Iterator[str]:
    """What the table does not show: that training went on behind the last validation, and what is a tie."""
    rows = read_metrics(metrics_path)
    validated = [row["step"] for row in rows if row.get("val/loss")]
    if validated and validated[-1] != rows[-1]["step"]:
        yield f"The last validation was at step {validated[-1]}, the policy is that of step {rows[-1]['step']}."
    stage = "val" if validated else "train"
    for row in rows:
        found = [row.get(f"{stage}/rewards/{name}", "") for name in ("accuracies", "margins")]
        if all(found) and not any(map(float, found)):
            yield f"At step {row['step']} policy and reference are equal: every pair is a tie, and counts as 0."


def markdown_table(rows: TableRows) -> str:
    """The table in Markdown, numbers to four digits."""
    header, *values = rows
    lines = [header, ["---:"] * len(header), *map(_short, values)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def print_results(rows: TableRows, title: str, remarks: Iterable[str] = ()) -> None:
    """Print the newest rows, and remarks below; on a narrow terminal a step is a column."""
    console = Console()
    header, *values = rows
    short = [header, *map(_short, values[-20:])]
    if console.width < 185:
        short = list(zip(header, *short[1:][-4:], strict=True))
    table = Table(title=title)
    for name in short[0]:
        table.add_column(name, justify="right")
    for line in short[1:]:
        table.add_row(*line)
    console.print(table, *remarks, sep="\n")


def print_metric_values(values: Mapping[str, float], stage: str) -> None:
    """Print what a validation or test measured, one metric a line."""
    table = Table("metric", title=f"Results of the {'validation' if stage == 'val' else stage} pairs")
    table.add_column("value", justify="right")
    for name, value in values.items():
        if name.startswith(f"{stage}/"):
            table.add_row(name, f"{value:.4f}")
    Console().print(table)


def _short(row: tuple[str, ...]) -> tuple[str, ...]:
    return row[0], *(f"{float(value):.4f}" if value else "" for value in row[1:])


def read_artifacts(run: Run) -> dict[str, Any]:
    """What a run left, as far as it is there: the table, the metrics, the last values, held-out pairs and its options.

    Numbers that are not finite are None; of long metrics some rows are left out.
    """
    header, *rows = csv.reader(_text(run.folder / "results.csv").splitlines() or [""])
    metrics = read_metrics(run.metrics_path)
    return {
        "name": run.folder.name,
        "results": {"header": header, "rows": rows},
        "metrics": [_numbers(row) for row in metrics[:: -(-len(metrics) // MAX_METRIC_ROWS) or 1]],
        "values": _numbers(json.loads(_text(run.results_path) or "{}")),
        "held_out": [json.loads(line) for line in _text(run.held_out_path).split("\n") if line],
        "config": _text(run.config_path),
    }


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _numbers(row: Mapping[str, Any]) -> dict[str, float | None]:
    numbers = {name: float(value or "nan") for name, value in row.items()}
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}

"""The table of results: what training and validation gave at every validation, as text, Markdown and CSV.

Takes the rows of metrics.csv. Knows nothing of how they were made.
"""

import csv
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dpo.loggers import read_metrics
from dpo.run import Run, complete

METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
)
HEADER = ("step", "training loss", "validation loss", *METRICS)


def results(metrics: Path) -> list[tuple[str, ...]]:
    """One row per validation: step, training loss, validation loss, then the validation's `METRICS`.

    The training loss is that of the last logged step before. Without validations, the logged training steps.
    """
    table, loss = [], ""
    rows = read_metrics(metrics)
    stage = "val" if any(row.get("val/loss") for row in rows) else "train"
    for row in rows:
        loss = row.get("train/loss") or loss
        if row.get(f"{stage}/loss"):
            validation = row["val/loss"] if stage == "val" else ""
            table.append((row["step"], loss, validation, *(row[f"{stage}/{name}"] for name in METRICS)))
    return table


def write(run: Run) -> list[tuple[str, ...]]:
    """Write results.csv and results.md into a run, from its metrics.csv."""
    rows = results(run.metrics)
    with complete(run.folder / "results.csv") as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])
    with complete(run.folder / "results.md") as temporary:
        temporary.write_text(markdown(rows))
    return rows


def markdown(rows: list[tuple[str, ...]]) -> str:
    """The table in Markdown, numbers to four digits."""
    lines = [HEADER, ["---:"] * len(HEADER), *([row[0], *map(_short, row[1:])] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def show(rows: list[tuple[str, ...]], title: str) -> None:
    """Print the newest rows; on a narrow terminal a step is a column."""
    console = Console()
    table = Table(title=title)
    short = [(row[0], *map(_short, row[1:])) for row in rows[-20:]]
    if console.width < 140:
        header, *short = zip(HEADER, *short[-4:], strict=True)
    else:
        header = HEADER
    for name in header:
        table.add_column(name, justify="right")
    for line in short:
        table.add_row(*line)
    console.print(table)


def _short(value: str) -> str:
    return f"{float(value):.4f}" if value else ""

"""What loggers of every kind are given beside metrics: samples, histograms of margins, the report, results of a test.

Weights & Biases, TensorBoard and MLflow each take them in their own way; what a logger cannot show is left out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray

from dpo.files import write_atomically
from dpo.runs.folder import Run
from dpo.runs.tracking import WandbTracker

MARGINS_NAME = "val/margins_of_pairs"


def join_run(options: Any, run: Run) -> None:
    """Let a logger go on with what it has logged for a run before, or else use the name of the run.

    Args:
        options: Class and arguments of the logger as they were parsed; they are changed in place. Arguments that the
            user has given stay.
        run: The run.
    """
    kind, arguments = str(getattr(options, "class_path", "")).rpartition(".")[2], getattr(options, "init_args", {})
    own: dict[str, str | None] = {}
    if kind == "TensorBoardLogger":
        own = {"version": run.folder.name}
    elif kind == "MLFlowLogger":
        path = _mlflow_id_path(run)
        own = {"run_name": run.folder.name, "run_id": path.read_text().strip() if path.is_file() else None}
    for name, value in own.items():
        if arguments[name] is None:
            arguments[name] = value


@rank_zero_only
def log_configuration(logger: Logger, run: Run, values: dict[str, Any]) -> None:
    """Log the configuration of a run, and remember which run of the logger it is.

    A parameter of MLflow keeps its first value: it refuses another one when the run is resumed.
    """
    if isinstance(logger, MLFlowLogger):
        with write_atomically(_mlflow_id_path(run)) as temporary:
            temporary.write_text(f"{logger.run_id}\n")
        if logger.experiment.get_run(logger.run_id).data.params:
            return
    if isinstance(logger, TensorBoardLogger):  # Lightning has saved one without values, and saves none over it
        Path(logger.log_dir, logger.NAME_HPARAMS_FILE).unlink(missing_ok=True)
    logger.log_hyperparams(values)


def log_samples(logger: Logger, rows: list[dict[str, Any]]) -> None:
    """Log the answers that were sampled at a step as a table.

    Args:
        logger: The logger.
        rows: The step, the prompt and an answer of every model, by name.
    """
    columns, data = list(rows[0]), [list(row.values()) for row in rows]
    if isinstance(logger, WandbLogger | WandbTracker):
        logger.log_text("samples", columns=columns, data=data)
    elif isinstance(logger, TensorBoardLogger):
        cells = [columns, ["---"] * len(columns), *([_table_cell(value) for value in row] for row in data)]
        table = "\n".join(f"| {' | '.join(row)} |" for row in cells)
        logger.experiment.add_text("samples", table, rows[0]["step"])
    elif isinstance(logger, MLFlowLogger):
        table_columns = {name: [row[name] for row in rows] for name in columns}
        logger.experiment.log_table(logger.run_id, table_columns, "samples.json")


def log_margins(logger: Logger, margins: NDArray[np.float32], step: int) -> None:
    """Log the histogram of the margins of the validation pairs.

    Args:
        logger: The logger.
        margins: Reward of the chosen answer minus that of the rejected one, a value for each pair.
        step: The optimizer step after which they were measured.
    """
    if isinstance(logger, WandbTracker):
        logger.log_histogram(MARGINS_NAME, margins, step)
    elif isinstance(logger, WandbLogger):
        logger.experiment.log({MARGINS_NAME: wandb.Histogram(margins.tolist()), "trainer/global_step": step})
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_histogram(MARGINS_NAME, margins, step)


def log_report(logger: Logger, report: Path) -> None:
    """Log the page that says what the run has learned, if it was written."""
    if not report.is_file():
        return
    if isinstance(logger, WandbTracker):
        logger.log_file("report", report)
    elif isinstance(logger, WandbLogger):
        logger.experiment.log_artifact(str(report), name=f"report-{logger.experiment.id}", type="report")
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_artifact(logger.run_id, str(report))


def log_results(logger: Logger, values: Mapping[str, float], step: int) -> None:
    """Log the results of a test, as values of the last step that the run has logged."""
    if isinstance(logger, WandbLogger):
        logger.experiment.summary.update(dict(values))
        return
    logger.log_metrics(dict(values), step)
    logger.finalize("success")


def _mlflow_id_path(run: Run) -> Path:
    return run.folder / "mlflow-run-id.txt"


def _table_cell(value: object) -> str:
    """Return a value as a cell of a Markdown table, which has one line and no bars."""
    return str(value).strip().replace("|", "\\|").replace("\n", "<br>")

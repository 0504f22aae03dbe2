"""The callbacks that the command line adds to every run, by verb."""

from typing import Any

import lightning as L

from dpo.callbacks.checkpoints import CheckpointCadence, LastAndBest
from dpo.callbacks.example import ExampleDisplay
from dpo.callbacks.ledger import LedgerOptions, LedgerWriter
from dpo.callbacks.margin_histogram import MarginHistogram
from dpo.callbacks.metrics_rewind import MetricsRewind
from dpo.callbacks.monitors import MonitorCheck
from dpo.callbacks.pair_groups import PairGroups
from dpo.callbacks.pending_validation import PendingValidation
from dpo.callbacks.predictions import PredictionWriter
from dpo.callbacks.progress import ProgressLines, TrainingProgressBar
from dpo.callbacks.rates import ThroughputLogger, TrainingClock
from dpo.callbacks.record import RunRecorder
from dpo.callbacks.samples import AnswerSampler
from dpo.callbacks.stopping import FinalValidation, GracefulStop
from dpo.data.datamodule import PairData, TextData
from dpo.runs.folder import Run
from dpo.runs.loggers import MetricsCSV


def standard_callbacks(
    verb: str, config: Any, config_text: str, run: Run, data: TextData, metrics_csv: MetricsCSV, stop: GracefulStop
) -> list[L.Callback]:
    """Return the callbacks of a verb in the order in which Lightning is to call them.

    Args:
        verb: fit, validate, test or predict.
        config: The verb's parsed options.
        config_text: The same options as YAML, with all defaults.
        run: The run whose folder is written to.
        data: The data of the run.
        metrics_csv: The logger that writes metrics.csv.
        stop: The callback that stops the run on a signal; the caller asks it for the exit code.

    Raises:
        ValueError: The verb needs preference pairs and the data are something else.
    """
    cadence = CheckpointCadence(**vars(config.checkpoint))
    pair_groups = PairGroups()
    callbacks: list[L.Callback] = [
        pair_groups,
        PendingValidation(),
        stop,
        FinalValidation(),
        LastAndBest(run, cadence),
    ]
    if verb == "predict":
        callbacks.append(PredictionWriter(run, config.output, config.scorer))
    elif not isinstance(data, PairData):
        raise ValueError(f"{verb}: expected preference pairs, got --data {type(data).__name__}; only predict uses it.")
    elif verb == "fit":
        callbacks = [
            MonitorCheck(data, cadence.monitor),
            MetricsRewind(metrics_csv),
            TrainingClock(metrics_csv),
            RunRecorder(run, data, config_text),
            ExampleDisplay(data),
            ThroughputLogger(data),
            AnswerSampler(run, data),
            LedgerWriter(run, data, LedgerOptions(**vars(config.ledger))),
            *callbacks,
            MarginHistogram(pair_groups),
        ]
    if config.trainer.enable_progress_bar is not False:
        callbacks += [TrainingProgressBar(), ProgressLines()]
    return callbacks

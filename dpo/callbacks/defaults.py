"""What stands beside training in every run, without being asked for: the callbacks of each verb.

Takes the verb, the run and its data. `dpo.cli.main` is its only caller.
"""

from typing import Any

import lightning as L

from dpo.callbacks.checkpoints import LastAndBest
from dpo.callbacks.metrics_rewind import MetricsRewind
from dpo.callbacks.optimizer_overrides import OptimizerOverrides
from dpo.callbacks.predictions import PredictionWriter
from dpo.callbacks.progress import ProgressLines, TrainingProgressBar
from dpo.callbacks.rates import ThroughputLogger
from dpo.callbacks.record import RunRecorder
from dpo.callbacks.resume_check import ResumeCheck
from dpo.callbacks.samples import AnswerSampler
from dpo.callbacks.stopping import FinalValidation, GracefulStop
from dpo.data.datamodule import PairData, TextData
from dpo.runs.folder import Run
from dpo.runs.loggers import MetricsCSV
from dpo.training.preflight import Preflight


def standard_callbacks(
    verb: str, config: Any, config_text: str, run: Run, data: TextData, metrics_csv: MetricsCSV, stop: GracefulStop
) -> list[L.Callback]:
    """In the order in which they are called; `config` is what the command line says, `text` the whole of it.

    Raises:
        ValueError: The data are no pairs, and the verb needs them.
    """
    found: list[L.Callback] = [stop, FinalValidation(), LastAndBest(run)]
    if verb == "predict":
        found.append(PredictionWriter(run, config.output, config.scorer))
    elif not isinstance(data, PairData):
        raise ValueError(f"{verb}: expected preference pairs, got --data {type(data).__name__}, which is for predict.")
    elif verb == "fit":
        refusing = [ResumeCheck(config.seed_everything, data), OptimizerOverrides(), Preflight(data)]
        found = [
            *refusing,
            MetricsRewind(metrics_csv),
            RunRecorder(run, data, config_text),
            ThroughputLogger(data),
            AnswerSampler(run, data),
            *found,
        ]
    if config.trainer.enable_progress_bar is not False:
        found += [TrainingProgressBar(), ProgressLines()]
    return found

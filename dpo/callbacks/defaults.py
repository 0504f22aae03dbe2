"""What stands beside training in every run, without being asked for: the callbacks of each verb.

Takes the verb, the run and its data. `dpo.cli.main` is its only caller.
"""

from typing import Any

import lightning as L

from dpo.callbacks.checkpoints import LastAndBest
from dpo.callbacks.metrics_rewind import Rewind
from dpo.callbacks.optimizer_overrides import Settings
from dpo.callbacks.predictions import Predictions
from dpo.callbacks.progress import Bar, Lines
from dpo.callbacks.rates import Rates
from dpo.callbacks.record import Record
from dpo.callbacks.resume_check import Terms
from dpo.callbacks.samples import Samples
from dpo.callbacks.stopping import LastStep, Stop
from dpo.data.datamodule import PairData, TextData
from dpo.runs.folder import Run
from dpo.runs.loggers import MetricsCSV
from dpo.training.preflight import Preflight


def callbacks(
    verb: str, config: Any, text: str, run: Run, data: TextData, log: MetricsCSV, stop: Stop
) -> list[L.Callback]:
    """In the order in which they are called; `config` is what the command line says, `text` the whole of it.

    Raises:
        ValueError: The data are no pairs, and the verb needs them.
    """
    found: list[L.Callback] = [stop, LastStep(), LastAndBest(run)]
    if verb == "predict":
        found.append(Predictions(run, config.output, config.scorer))
    elif not isinstance(data, PairData):
        raise ValueError(f"{verb}: expected preference pairs, got --data {type(data).__name__}, which is for predict.")
    elif verb == "fit":
        refusing = [Terms(config.seed_everything, data), Settings(), Preflight(data)]
        found = [*refusing, Rewind(log), Record(run, data, text), Rates(data), Samples(run, data), *found]
    if config.trainer.enable_progress_bar is not False:
        found += [Bar(), Lines()]
    return found

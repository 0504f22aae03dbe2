"""What stands beside training in every run, without being asked for: the callbacks of each verb.

Takes the verb, the run and its data. `dpo.cli` is its only caller.
"""

from typing import Any

import lightning as L

from dpo.callbacks import LastStep, Predictions, Rates, Record, Stop
from dpo.checkpoints import LastAndBest, Settings
from dpo.console import Bar, Lines, Samples
from dpo.loggers import MetricsCSV, Rewind
from dpo.pairs import PairData
from dpo.preflight import Preflight
from dpo.resuming import Terms
from dpo.run import Run
from dpo.texts import TextData


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

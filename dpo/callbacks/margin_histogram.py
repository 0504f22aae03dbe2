"""The callback that sends the margins of the validation pairs to the loggers that draw histograms."""

import lightning as L

from dpo.callbacks.pair_groups import PairGroups
from dpo.runs.trackers import log_margins


class MarginHistogram(L.Callback):
    """Logs the histogram of margins at every validation of a fit."""

    def __init__(self, pair_groups: PairGroups) -> None:
        """Take the pairs from the callback that keeps them, which Lightning must call first."""
        self.pair_groups = pair_groups

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the margins of the pairs of all processes."""
        rows = self.pair_groups.rows
        if not trainer.is_global_zero or trainer.sanity_checking or trainer.state.fn != "fit" or not len(rows):
            return
        margins = rows["chosen_reward"].to_numpy() - rows["rejected_reward"].to_numpy()
        for logger in trainer.loggers:
            log_margins(logger, margins, trainer.global_step)

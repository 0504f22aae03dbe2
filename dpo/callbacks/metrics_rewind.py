"""The table of metrics of a run that goes on from a checkpoint.

Takes the table. Knows nothing of what it holds.
"""

import lightning as L

from dpo.runs.loggers import MetricsCSV


class MetricsRewind(L.Callback):
    """Takes metrics.csv back to the checkpoint that training goes on from."""

    def __init__(self, metrics_csv: MetricsCSV) -> None:
        """Choose the file."""
        self.metrics_csv = metrics_csv

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The steps of the checkpoint are known now, and none has been taken."""
        self.metrics_csv.rewind_to_step(trainer.global_step)

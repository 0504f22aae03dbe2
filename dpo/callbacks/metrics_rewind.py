"""The callback that truncates ``metrics.csv`` when a run resumes."""

import lightning as L

from dpo.runs.loggers import MetricsCSV


class MetricsRewind(L.Callback):
    """Removes the rows of metrics.csv behind the checkpoint, whose steps are about to be taken again."""

    def __init__(self, metrics_csv: MetricsCSV) -> None:
        """Rewind the file of `metrics_csv`."""
        self.metrics_csv = metrics_csv

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rewind to the checkpoint's step, which Lightning has restored by now; no new step has been taken."""
        self.metrics_csv.rewind_to_step(trainer.global_step)

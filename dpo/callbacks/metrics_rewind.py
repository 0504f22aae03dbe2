"""The callback that truncates ``metrics.csv`` when a run resumes."""

import lightning as L

from dpo.runs.loggers import MetricsCSV
from dpo.training.base import Stage
from dpo.training.position import log_interval


class MetricsRewind(L.Callback):
    """Removes the rows of metrics.csv behind the checkpoint, whose steps are about to be taken again."""

    def __init__(self, metrics_csv: MetricsCSV) -> None:
        """Rewind the file of `metrics_csv`."""
        self.metrics_csv = metrics_csv

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rewind to the checkpoint's step, which Lightning has restored by now; no new step has been taken.

        Training metrics of a step that only the end of the run has logged go too: the resumed run logs their means
        together with those of the next steps, as the uninterrupted run does.
        """
        assert isinstance(pl_module, Stage)
        is_logged = trainer.global_step % log_interval(trainer) == 0
        self.metrics_csv.rewind_to_step(trainer.global_step, drop_prefix="" if is_logged else "train/")
        row = self.metrics_csv.last_row  # empty in a run that continues the checkpoint of another
        is_in_row = row.get("step") == trainer.global_step and bool(row.get("train/loss"))
        pl_module.restored_step_is_logged = not row or is_in_row

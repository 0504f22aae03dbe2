"""What a run is made of, written down where it begins.

Takes the configuration and the data; changes nothing about training.
"""

import json

import lightning as L
import yaml

from dpo.data.datamodule import PairData
from dpo.files import write_atomically
from dpo.runs.folder import Run


class RunRecorder(L.Callback):
    """Gives the resolved configuration and the audit of the data to the run and to every logger."""

    def __init__(self, run: Run, data: PairData, config: str) -> None:
        """Take them from here."""
        self.run, self.data, self.config = run, data, config

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before anything is trained, and after all that may refuse to: what a run did is not overwritten by that."""
        audits = {split: audit.to_dict() for split, audit in self.data.audits_by_split.items()}
        if trainer.is_global_zero:
            self.run.config_path.write_text(self.config)
            with write_atomically(self.run.audit_path) as temporary:
                temporary.write_text(json.dumps(audits, indent=2) + "\n")
            self.run.link_as_latest()
        for logger in trainer.loggers:
            logger.log_hyperparams({**yaml.safe_load(self.config), "audit": audits})

"""The callback that records a run's configuration and data audit when training begins."""

from typing import Any

import lightning as L
import yaml

from dpo.data.datamodule import PairData
from dpo.files import write_atomically
from dpo.runs import inventory
from dpo.runs.folder import Run
from dpo.runs.trackers import log_configuration
from dpo.secrets import conceal
from dpo.training.base import Stage


class RunRecorder(L.Callback):
    """Writes the resolved configuration and the data audit into the run's folder and to every logger."""

    def __init__(self, run: Run, data: PairData, config: str) -> None:
        """Choose what is recorded and where.

        Args:
            run: The run whose folder is written to.
            data: The data whose audit is recorded.
            config: The resolved configuration as YAML.
        """
        self.run = run
        self.data = data
        self.config = config
        self.recorded = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record once no check can refuse the run any more, so that a refused one overwrites no older record."""
        self._record(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record a fit that had no step left to take; Lightning skips `on_train_start` then."""
        if not self.recorded:
            self._record(trainer, pl_module)

    def _record(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        self.recorded = True
        audits = {split: audit.to_dict() for split, audit in self.data.audits_by_split.items()}
        if trainer.is_global_zero:
            assert isinstance(stage, Stage)
            self.run.config_path.write_text(self.config)
            with write_atomically(self.run.audit_path) as temporary:
                temporary.write_text(conceal(inventory.audit_json(audits, list_loaded(stage, self.data))))
            self.run.link_as_latest()
        for logger in trainer.loggers:
            log_configuration(logger, self.run, {**yaml.safe_load(self.config), "audit": audits})


def list_loaded(stage: Stage, data: PairData) -> dict[str, Any]:
    """Return what audit.json lists as loaded (see `dpo.runs.inventory`).

    Args:
        stage: The module, whose models are read.
        data: Its data, whose splits are read.
    """
    origin = stage.origin()
    reference = getattr(stage, "reference", None)
    return {
        "weights": inventory.hash_model_files([origin.base, origin.reference], inventory.WEIGHTS),
        "reference_sha256": getattr(reference, "sha256", ""),  # of the weights in memory, before training
        "tokenizer": inventory.hash_model_files([data.tokenizer_name], inventory.TOKENIZER),
        "data": {source.file: source.content_id() for source in data.list_sources(fetch=False)},
        "training_pairs_sha256": data.training_sha256,
        "code": inventory.code_state(),
        "libraries": inventory.library_versions(),
    }

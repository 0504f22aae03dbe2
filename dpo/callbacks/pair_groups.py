"""The callback that keeps the pairs of a validation or test, and logs the metrics of every subset."""

import lightning as L
import pyarrow as pa
import torch

from dpo.callbacks.pair_buffer import PairBuffer
from dpo.runs.groups import PairGroup, measure_groups, subset_means
from dpo.training.base import Stage
from dpo.training.scored_pairs import ScoredPairs

SUBSET_METRICS = ("loss", "rewards/accuracies", "rewards/margins")
GROUPED_COLUMNS = [
    "subset",
    "turns",
    "chosen_tokens",
    "rejected_tokens",
    "reference_chosen_logp",
    "reference_rejected_logp",
    "chosen_reward",
    "rejected_reward",
    "loss",
]


class PairGroups(L.Callback):
    """Collects the pairs of all processes in every validation and test.

    Attributes:
        rows: The pairs of the last validation or test, without ids, about 40 bytes each; empty if there are none.
    """

    def __init__(self) -> None:
        """Start without pairs."""
        self.rows = pa.table({})
        self._measured: list[PairGroup] | None = None
        self._buffer = PairBuffer()
        self._blocks: list[pa.Table] = []

    def _begin(self, stage: L.LightningModule) -> None:
        assert isinstance(stage, Stage)
        self._buffer, self._blocks = PairBuffer(), []
        stage.pair_listeners.append(self._receive)

    def _receive(self, stage: L.LightningModule, pairs: ScoredPairs) -> None:
        self._buffer.add_pairs(pairs, 0)
        if self._buffer.is_full:
            self._empty_buffer()

    def _empty_buffer(self) -> None:
        rows = self._buffer.take_rows("", 0, trained=False).select(GROUPED_COLUMNS)
        self._blocks.append(rows.set_column(0, "subset", rows["subset"].dictionary_encode()))

    def _finish(self, trainer: L.Trainer, stage: L.LightningModule, prefix: str) -> None:
        assert isinstance(stage, Stage)
        stage.pair_listeners.remove(self._receive)
        self._empty_buffer()
        rows = pa.concat_tables(gather_tables(pa.concat_tables(self._blocks), trainer.world_size))
        self.rows = rows.set_column(0, "subset", rows["subset"].cast(pa.string()))
        self._measured = None
        if means := subset_means(self.rows):
            stage.log_values({f"{prefix}/{name}": value for name, value in means.items()})

    def measure(self) -> list[PairGroup]:
        """Return what was measured of all pairs of the last validation or test and of groups of them."""
        if self._measured is None:  # the bootstrap may take seconds
            self._measured = measure_groups(self.rows)
        return self._measured

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to collect the pairs."""
        self._begin(pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to collect the pairs."""
        self._begin(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the pairs of all processes together, and log the metrics of their subsets."""
        self._finish(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the pairs of all processes together, and log the metrics of their subsets."""
        self._finish(trainer, pl_module, "test")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop collecting the pairs."""
        assert isinstance(pl_module, Stage)
        pl_module.pair_listeners = [each for each in pl_module.pair_listeners if each != self._receive]


def gather_tables(table: pa.Table, world_size: int) -> list[pa.Table]:
    """Return the tables of all processes, in every process."""
    tables: list[pa.Table] = [table] * world_size
    if world_size > 1:
        torch.distributed.all_gather_object(tables, table)
    return tables

"""Checks, before training, of the metrics that callbacks watch."""

from collections.abc import Iterable
from difflib import get_close_matches

import lightning as L

from dpo.callbacks.checkpoints import CheckpointCadence, LastAndBest
from dpo.callbacks.pair_groups import SUBSET_METRICS
from dpo.data.datamodule import PairData
from dpo.training.base import Stage

# Metrics of training that do not come from the losses.
_EXTRA_METRICS = ("learning_rate", "grad_norm", "tokens_per_second", "time/step", "time/data")


class MonitorCheck(L.Callback):
    """Refuses callbacks that watch a metric of a subset that there is not, once the data are read."""

    def __init__(self, data: PairData, best_by: str) -> None:
        """Take the data whose validation pairs have subsets, and the metric of best.ckpt."""
        self.data = data
        self.best_by = best_by

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check all callbacks of a fit.

        Raises:
            ValueError: One of them watches a metric that is never logged.
        """
        assert isinstance(pl_module, Stage)
        if not trainer.limit_val_batches and self.best_by != CheckpointCadence().monitor:
            raise ValueError(
                f"--checkpoint.monitor {self.best_by}: expected validations, whose best is best.ckpt, got none. Leave "
                "it out, or see --data.val_fraction and --trainer.limit_val_batches."
            )
        if stage == "fit" and "val" in self.data.pairs_by_split:
            pairs = self.data.pairs_by_split["val"]
            names = sorted(set(pairs.table.data.table["subset"].to_numpy()[pairs.row_numbers]))
            callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning does not declare it
            check_monitored_metrics(callbacks, pl_module, names if len(names) > 1 else [])


def check_monitored_metrics(callbacks: Iterable[L.Callback], stage: Stage, subsets: list[str] | None = None) -> None:
    """Refuse callbacks that watch a metric that is never logged; Lightning would stop in the middle of the run.

    Args:
        callbacks: The callbacks; those without a metric are passed over.
        stage: The stage that logs its metrics.
        subsets: Subsets of the validation pairs that have metrics of their own. None: not known yet.

    Raises:
        ValueError: With the metrics that there are.
    """
    names = (*stage.metric_names, *stage.derived_metrics)
    known = [f"val/{name}" for name in names] + [f"train/{name}" for name in (*names, *_EXTRA_METRICS)]
    of_subsets = [f"val/{name}/" for name in SUBSET_METRICS if len(stage.answer_sides) == 2]
    known += [f"{name}{subset}" for name in of_subsets for subset in subsets or ["SUBSET"] if subsets != []]
    unknown_subsets = tuple(of_subsets) if subsets is None else ()
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and monitor not in known and not monitor.startswith(unknown_subsets):
            near = get_close_matches(monitor.replace("_", "/", 1), known, n=1, cutoff=0.7)
            hint = f" Did you mean {near[0]}?" if near else ""
            option = "--checkpoint.monitor" if isinstance(callback, LastAndBest) else "--trainer.callbacks"
            raise ValueError(
                f"{option}: {type(callback).__name__} watches {monitor!r}, expected one of {', '.join(known)}.{hint}"
            )

"""A check, before training, of the metrics that the user's callbacks watch."""

from collections.abc import Iterable
from difflib import get_close_matches

import lightning as L

from dpo.training.base import Stage

# Metrics of training that do not come from the losses.
_EXTRA_METRICS = ("learning_rate", "grad_norm", "tokens_per_second", "time/step", "time/data")


def check_monitored_metrics(callbacks: Iterable[L.Callback], stage: Stage) -> None:
    """Refuse callbacks that watch a metric that is never logged; Lightning would stop in the middle of the run.

    Raises:
        ValueError: With the metrics that there are.
    """
    names = (*stage.metric_names, *stage.derived_metrics)
    known = [f"val/{name}" for name in names] + [f"train/{name}" for name in (*names, *_EXTRA_METRICS)]
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and monitor not in known:
            near = get_close_matches(monitor.replace("_", "/", 1), known, n=1, cutoff=0.7)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"--trainer.callbacks: {type(callback).__name__} watches {monitor!r}, expected one of "
                f"{', '.join(known)}.{hint}"
            )

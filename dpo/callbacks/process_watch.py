"""The processes of a run watch each other: where one dies or hangs, all end, and say why."""

import math
import os
import signal
import threading
from contextlib import suppress
from typing import Any

import lightning as L
import torch.distributed
from lightning.pytorch.strategies.launchers import subprocess_script

from dpo.runs.signals import RUN_SIGNALS, StopSignals

BEAT_INTERVAL = 2.0  # seconds from one sign of life to the next
SILENCE_LIMIT = 40.0  # seconds without one after which a process counts as lost; long calls may hold Python's lock
_ENDED = b"ended"


def replace_process_watch(trainer: L.Trainer) -> None:
    """Replace Lightning's handling of signals and of launched processes by that of `RUN_SIGNALS`.

    Lightning's handler calls a collective, which hangs unless all processes get the signal. Its observer kills this
    process, without a word and while it may be exporting, once a launched one ends with another exit code than 0.
    """
    vars(trainer._signal_connector)["register_signal_handlers"] = lambda: None
    vars(subprocess_script)["_launch_process_observer"] = RUN_SIGNALS.watch_children


class ProcessWatch(L.Callback):
    """Ends the run where a process gives no sign of life, wherever it runs and whoever has launched it.

    A thread of every process writes a number into the store by which the processes have found each other, and another
    counts how often nothing new was read of each; time during which this process itself was asleep does not count.
    Calls that wait for other processes, as long as these are alive, are bounded by the strategy's `timeout` alone.
    """

    def __init__(self, signals: StopSignals = RUN_SIGNALS, limit: float = SILENCE_LIMIT) -> None:
        """End the run by `signals` after `limit` seconds of silence."""
        self.signals = signals
        self.limit = limit
        self.has_ended = threading.Event()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin, once the processes are connected."""
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            self.has_ended.clear()
            store: Any = torch.distributed.distributed_c10d._get_default_store()
            self.begin(store.clone(), trainer.global_rank, trainer.world_size)

    def begin(self, store: Any, rank: int, size: int) -> None:
        """Give signs of life, and expect them of all others, in two threads."""
        silences = {other: 0.0 for other in range(size) if other != rank}
        for target, arguments in ((self._exchange, [store, rank, silences]), (self._count, [silences])):
            threading.Thread(target=target, args=arguments, daemon=True).start()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """End in order: the others need not wait for further signs of life."""
        self.has_ended.set()

    def _exchange(self, store: Any, rank: int, silences: dict[int, float]) -> None:
        beats = dict.fromkeys(silences, b"")
        number = 0
        with suppress(RuntimeError):  # the process that holds the store is lost, which is counted as silence
            while not self.has_ended.wait(BEAT_INTERVAL):
                number += 1
                store.set(_beat_key(rank), str(number))
                for other in [each for each in silences if store.check([_beat_key(each)])]:
                    beat = store.get(_beat_key(other))
                    if beat != beats[other]:
                        silences[other] = -math.inf if beat == _ENDED else 0.0
                    beats[other] = beat
            store.set(_beat_key(rank), _ENDED)

    def _count(self, silences: dict[int, float]) -> None:
        while not self.has_ended.wait(BEAT_INTERVAL):
            for other in silences:
                silences[other] += BEAT_INTERVAL
                if silences[other] >= self.limit:
                    self._end(other)
                    return

    def _end(self, other: int) -> None:
        self.has_ended.set()
        if other == 0 and self.signals.launcher:  # it may be stopped, and would stay
            os.kill(self.signals.launcher, signal.SIGKILL)
        self.signals.end_all(
            f"process {other} of the run has given no sign of life for {self.limit:.0f} seconds; the others end too."
        )


def _beat_key(rank: int) -> str:
    return f"dpo/beat/{rank}"

"""What the processes of a run tell each other between steps: the largest of some numbers, in one exchange for all."""

import math
import time
from collections.abc import Callable
from weakref import WeakKeyDictionary

import lightning as L
import torch

EXCHANGE_SECONDS = 3.0  # from one exchange to the next, so that a signal to one process is obeyed in time
MAX_EXCHANGE_STEPS = 100


class Agreement:
    """Numbers of every process, of which all processes learn the largest.

    Each exchange makes the host wait for the device. There is one every few optimizer steps: their number follows from
    the seconds that the slowest process took per step, which are exchanged too, so that it is the same everywhere.

    Attributes:
        numbers: The functions that return this process's numbers, by name; the same names in all processes.
        next_step: Optimizer step after which the next exchange is due.
    """

    def __init__(self) -> None:
        """Start without numbers."""
        self.numbers: dict[str, Callable[[], float]] = {}
        self.next_step = 0
        self._exchanged_step = -1
        self._exchanged_at = math.inf
        self._largest: dict[str, float] = {}

    def largest(self, trainer: L.Trainer, name: str) -> float:
        """Return the largest number of all processes, or 0 between exchanges; call it after the same steps everywhere.

        Args:
            trainer: The trainer, at the end of an optimizer step.
            name: Which number.
        """
        if trainer.world_size == 1:
            return self.numbers[name]()
        if trainer.global_step >= self.next_step and trainer.global_step != self._exchanged_step:
            self._exchange(trainer)
        return self._largest[name] if trainer.global_step == self._exchanged_step else 0.0

    def _exchange(self, trainer: L.Trainer) -> None:
        step, now = trainer.global_step, time.monotonic()
        per_step = max(0.0, now - self._exchanged_at) / max(1, step - self._exchanged_step)
        values = [*(number() for number in self.numbers.values()), per_step or EXCHANGE_SECONDS]
        ours = torch.tensor(values, device=trainer.strategy.root_device)
        *largest, slowest = trainer.strategy.reduce(ours, reduce_op="max").tolist()
        self._largest = dict(zip(self.numbers, largest, strict=True))
        self.next_step = step + min(MAX_EXCHANGE_STEPS, max(1, int(EXCHANGE_SECONDS / slowest)))
        self._exchanged_step, self._exchanged_at = step, now


_AGREEMENTS: WeakKeyDictionary[L.Trainer, Agreement] = WeakKeyDictionary()


def agreement_of(trainer: L.Trainer) -> Agreement:
    """Return the agreement of the processes of a trainer, which its callbacks share."""
    return _AGREEMENTS.setdefault(trainer, Agreement())

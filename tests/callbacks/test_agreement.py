"""How processes agree: the largest number of all, exchanged once every few steps for all who ask."""

import time
from unittest.mock import Mock, patch

import lightning as L
import torch
from torch import Tensor

from dpo.callbacks.agreement import EXCHANGE_SECONDS, MAX_EXCHANGE_STEPS, Agreement


class Processes:
    """Two processes of which the other one has these numbers; counts exchanges and moves the clock with every step."""

    def __init__(self, other: list[float], step_seconds: float) -> None:
        self.exchanges, self.now = 0, 0.0
        self.step_seconds = step_seconds
        self.trainer = Mock(spec=L.Trainer, world_size=2, global_step=0)
        self.trainer.strategy.root_device = torch.device("cpu")
        self.trainer.strategy.reduce = self.reduce
        self.other = other

    def reduce(self, ours: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "max"
        self.exchanges += 1
        return torch.maximum(ours, torch.tensor([*self.other, 0.0]))

    def step(self) -> None:
        self.trainer.global_step += 1
        self.now += self.step_seconds


def run(processes: Processes, steps: int) -> list[tuple[int, float, float]]:
    """Return (step, signal, late) for every step at which something was told."""
    agreement = Agreement()
    agreement.numbers |= {"signal": lambda: 0.0, "late": lambda: 0.0}
    told = []
    with patch.object(time, "monotonic", lambda: processes.now):
        for _ in range(steps):
            processes.step()
            signal, late = (agreement.largest(processes.trainer, name) for name in ("signal", "late"))
            if signal or late:
                told.append((processes.trainer.global_step, signal, late))
    return told


def test_all_numbers_go_into_one_exchange_every_few_seconds() -> None:
    for step_seconds, every in ((10.0, 1), (0.5, 6), (1e-4, MAX_EXCHANGE_STEPS)):
        processes = Processes([0.0, 0.0], step_seconds)
        run(processes, 300)
        assert abs(processes.exchanges - 300 / every) <= 2, step_seconds
        assert every * step_seconds <= max(EXCHANGE_SECONDS, step_seconds)


def test_what_one_process_says_all_learn_at_the_same_step() -> None:
    processes = Processes([15.0, 1.0], 1.0)
    told = run(processes, 9)
    assert told == [(1, 15.0, 1.0), (2, 15.0, 1.0), (5, 15.0, 1.0), (8, 15.0, 1.0)]


def test_a_process_alone_is_asked_at_every_step() -> None:
    agreement = Agreement()
    agreement.numbers["signal"] = iter([0, 2, 15]).__next__
    trainer = Mock(spec=L.Trainer, world_size=1)
    assert [agreement.largest(trainer, "signal") for _ in range(3)] == [0, 2, 15]

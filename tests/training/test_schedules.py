"""Learning rates of `Warmup`, as its docstring defines them."""

import pytest
import torch

from dpo.training.schedules import Warmup


def rates(steps: int, **options: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = Warmup(optimizer, **options)
    learning_rates = []
    for _ in range(steps):
        learning_rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return learning_rates


def test_warm_up_then_constant() -> None:
    assert rates(6, warmup_steps=4) == pytest.approx([2 * 1 / 4, 2 * 2 / 4, 2 * 3 / 4, 2, 2, 2])


def test_no_warm_up() -> None:
    assert rates(2, warmup_steps=0) == [2, 2]


def test_decay_ends_at_zero() -> None:
    assert rates(8, warmup_steps=2, total_steps=6) == pytest.approx([1, 2, 2, 2 * 3 / 4, 2 * 2 / 4, 2 * 1 / 4, 0, 0])


@pytest.mark.parametrize("options", [{"warmup_steps": -1}, {"warmup_steps": 5, "total_steps": 5}])
def test_impossible_schedules_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="warmup_steps < total_steps"):
        rates(1, **options)

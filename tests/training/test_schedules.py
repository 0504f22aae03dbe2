"""Learning rates of `Warmup`, as its docstring defines them."""

import pytest
import torch

from dpo.training.schedules import Warmup


def rates(steps: int, run_steps: int | None = None, **options: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = Warmup(optimizer, **options)
    if run_steps is not None:
        schedule.set_run_steps(run_steps)
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


def test_a_warm_up_is_a_share_of_the_steps_of_the_run() -> None:
    """A share of 0.15 of 20 steps is 3 steps; of 21 steps, 3.15, rounded up to 4."""
    assert rates(4, run_steps=20, warmup_ratio=0.15) == pytest.approx([2 / 3, 4 / 3, 2, 2])
    assert rates(5, run_steps=21, warmup_ratio=0.15) == pytest.approx([2 / 4, 1, 2 * 3 / 4, 2, 2])
    assert rates(2, run_steps=20, warmup_ratio=0.0) == [2, 2]
    assert rates(3, run_steps=4, warmup_ratio=0.5, total_steps=4) == pytest.approx([1, 2, 2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_ratio": 0.1, "warmup_steps": 150}, "either warmup_ratio or warmup_steps, got 0.1 and 150"),
        ({"warmup_ratio": -0.1}, "a share from 0 to 1, got -0.1"),
        ({"warmup_ratio": 0.1, "run_steps": float("inf")}, "a run of a known number of steps"),
    ],
)
def test_impossible_shares_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rates(1, **options)


def test_a_warm_up_longer_than_the_run_is_warned_of(caplog) -> None:
    """The last of 27 steps uses 27 / 150 of a rate of 2."""
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    rates(1, run_steps=150)
    assert not caplog.messages
    rates(1, run_steps=27)
    assert "warm-up of 150 steps is longer than the run of 27: the learning rate ends at 0.36 and" in caplog.text


def test_a_checkpoint_holds_no_options_of_the_schedule() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    assert Warmup(optimizer).state_dict().keys().isdisjoint({"warmup_steps", "total_steps", "warmup_ratio"})

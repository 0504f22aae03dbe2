"""The same pairs are in the same optimizer step however it is split, reproducibly from seed and epoch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.data.sampler import EpochPlan, StepLoader, StepSampler
from dpo.models.batch import Example

COSTS = st.lists(st.integers(2, 60), min_size=1, max_size=60)


def rows_of(sampler: StepSampler) -> list[list[int]]:
    return [[row for micro in micros for row in micro] for micros, _, _ in sampler]


@given(COSTS, st.integers(1, 9), st.integers(20, 200), st.integers(0, 3))
def test_packing_never_moves_a_pair_to_another_step(costs: list[int], size: int, bound: int, epoch: int) -> None:
    packed, whole = (StepSampler(costs, EpochPlan(size, limit, shuffle=True, seed=7)) for limit in (bound, None))
    for sampler in (packed, whole):
        sampler.set_epoch(epoch)
    for (micros, _, pairs), expected in zip(packed, rows_of(whole), strict=True):
        assert sorted(row for micro in micros for row in micro) == sorted(expected)
        assert sorted(pairs) == sorted(expected)
        assert all(len(micro) == 1 or sum(costs[row] for row in micro) <= bound for micro in micros)


@given(COSTS, st.integers(1, 3), st.integers(1, 3), st.integers(0, 3))
def test_devices_and_accumulation_share_the_same_steps(
    costs: list[int], world: int, accumulate: int, more: int
) -> None:
    size = world * accumulate + more
    whole = StepSampler(costs, EpochPlan(size, None, shuffle=True))
    parts = [
        StepSampler(
            costs, EpochPlan(size, 40, shuffle=True, rank=rank, world_size=world, accumulate_batches=accumulate)
        )
        for rank in range(world)
    ]
    batches = [list(part) for part in parts]
    assert len({len(device) for device in batches}) == 1  # every device has the same number of batches
    expected = [sorted(rows) for rows in rows_of(whole) if len(rows) >= world * accumulate]
    for step, rows in enumerate(expected):
        own = [device[step * accumulate + window] for device in batches for window in range(accumulate)]
        assert all(micros and sorted(step_rows) == rows for micros, _, step_rows in own)  # every device has work
        assert sorted(row for micros, _, _ in own for micro in micros for row in micro) == rows


def test_order_is_a_function_of_seed_and_epoch() -> None:
    plan = EpochPlan(4, shuffle=True, seed=3)
    assert plan.epoch_order(20, 1).tolist() == EpochPlan(8, shuffle=True, seed=3).epoch_order(20, 1).tolist()
    assert plan.epoch_order(20, 1).tolist() != plan.epoch_order(20, 2).tolist()
    assert plan.epoch_order(20, 1).tolist() != EpochPlan(4, shuffle=True, seed=4).epoch_order(20, 1).tolist()
    assert EpochPlan(4).epoch_order(5, 1).tolist() == [0, 1, 2, 3, 4]


class Pairs:
    """Twelve pairs of different lengths."""

    token_counts = tuple(5 + i for i in range(12))
    answer_token_counts = (4,) * 12

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Example:
        return Example(f"row:{index}", [1] * (1 + index), ([2, 3], [4, 5]))


def ids(loader: StepLoader) -> list[tuple[str, ...]]:
    return [tuple(i for micro in step.micro_batches for i in micro.ids) for step in loader]


def test_a_loader_continues_after_its_saved_position() -> None:
    plan = EpochPlan(2, shuffle=True)
    whole, stopped, resumed = (StepLoader(Pairs(), plan) for _ in range(3))
    expected = ids(whole)
    iterator = iter(stopped)
    first = [next(iterator) for _ in range(4)]
    assert len(first) == 4
    resumed.load_state_dict(stopped.state_dict())
    assert ids(resumed) == expected[4:]
    assert ids(resumed) == expected  # the next epoch starts from the beginning


def test_the_position_at_the_end_of_an_epoch_is_zero() -> None:
    loader = StepLoader(Pairs(), EpochPlan(3))
    assert len(ids(loader)) == len(loader) == 4
    assert loader.state_dict() == {"position": 0}


def test_a_batch_too_small_for_the_devices_raises() -> None:
    with pytest.raises(ValueError, match=r"at least devices \* accumulate_grad_batches = 2 \* 2, got 3"):
        StepLoader(Pairs(), EpochPlan(3, world_size=2, accumulate_batches=2))

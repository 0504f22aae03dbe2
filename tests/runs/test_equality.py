"""The comparison of two runs: what counts as equal, and what is said of what is not."""

import math

import pytest
import torch

from dpo.runs.equality import compare_values


@pytest.mark.parametrize(
    ("expected", "found", "difference"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]), 0.5),
        (torch.tensor([0.0]), torch.tensor([-0.0]), 0.0),  # other bits
        (torch.tensor([1.0]), torch.tensor([1.0]).double(), math.nan),
        (torch.tensor([1.0]), torch.tensor([[1.0]]), math.nan),
        (torch.tensor(3), torch.tensor(5), 2.0),
        (torch.tensor(1.0), 1.0, math.nan),
        (1.0, math.nan, math.nan),
        (2, 5, 3),
        ("a", "b", math.nan),
        (None, 1.0, math.nan),
    ],
)
def test_what_differs_is_named_with_by_how_much(expected: object, found: object, difference: float) -> None:
    part = compare_values("part", {"same": 1, "value": expected}, {"same": 1, "value": found})
    assert part.compared == 2
    assert part.differing == ["value"]
    assert part.difference == pytest.approx(difference, nan_ok=True)


@pytest.mark.parametrize(
    "value",
    [torch.tensor([math.nan, -0.0]), torch.tensor(1), torch.empty(0), torch.tensor([True]), math.nan, 1, "a", None],
)
def test_equal_values_are_equal(value: object) -> None:
    other = value.clone() if isinstance(value, torch.Tensor) else value
    part = compare_values("part", {"value": value}, {"value": other})
    assert (part.compared, part.difference, part.differing) == (1, 0.0, [])


def test_a_value_of_one_run_alone_is_a_difference() -> None:
    part = compare_values("part", {"a": 1, "b": 1.0}, {"a": 1, "c": 1.0})
    assert (part.compared, part.differing) == (3, ["b", "c"])
    assert math.isnan(part.difference)


def test_the_largest_difference_is_the_one_that_is_no_number() -> None:
    assert math.isnan(compare_values("part", {"a": 1, "b": "x"}, {"a": 9, "b": "y"}).difference)
    assert compare_values("part", {"a": 1, "b": 4.0}, {"a": 9, "b": 5.0}).difference == 8

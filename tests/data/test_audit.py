"""Audits: the counts of rows, and how they are shown."""

import io
import json

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from dpo.data.audit import KEPT_VERDICT, Audit, LengthSummary
from dpo.data.dialogue import Refusal
from dpo.data.formats import Fault


def kept(subset: str, prompt: int, chosen: int, rejected: int, **columns: int | bool) -> dict[str, object]:
    row = {"turns_dropped": 0, "prompt_cut": False, "chosen_cut": False, "rejected_cut": False}
    ids = {"prompt": [1] * prompt, "chosen": [1] * chosen, "rejected": [1] * rejected}
    characters = {"chosen_chars": chosen, "rejected_chars": rejected}
    return {"subset": subset, "verdict": KEPT_VERDICT} | ids | characters | row | columns


def unused(subset: str, reason: Refusal | Fault) -> dict[str, object]:
    return kept(subset, 0, 0, 0) | {"verdict": reason.value}


ROWS = [
    kept("a", 10, 4, 2, turns_dropped=2),
    kept("a", 20, 4, 8, turns_dropped=4, prompt_cut=True),
    kept("a", 60, 5, 5, chosen_cut=True),
    kept("a", 30, 9, 1, rejected_cut=True),
    unused("a", Refusal.EMPTY_ANSWER),
    unused("a", Refusal.EMPTY_ANSWER),
    unused("a", Fault.BROKEN_JSON),
    unused("b", Refusal.HISTORIES_DIFFER),
]
AUDIT = Audit.from_table("train", pa.Table.from_pylist(ROWS))


def test_counts() -> None:
    a = AUDIT.counts_by_subset["a"]
    assert (a.read, a.kept) == (7, 4)
    assert {name: number for name, number in a.refused.items() if number} == {"empty_answer": 2}
    assert {name: number for name, number in a.bad.items() if number} == {"broken_json": 1}
    assert a.tokens["prompt"] == LengthSummary(
        mean=(10 + 20 + 60 + 30) / 4,
        median=(20 + 30) / 2,
        p95=30 + (60 - 30) * (0.95 * 3 - 2),  # between the third and the fourth value
        max=60,
    )
    assert a.cut == {"turns_dropped": 2 / 4, "prompt_cut": 1 / 4, "chosen_cut": 1 / 4, "rejected_cut": 1 / 4}
    assert a.longer_wins == (1 + 0 + 0.5 + 1) / 4


def test_total_is_the_sum_of_the_subsets_and_nothing_is_missing() -> None:
    assert list(AUDIT.counts_by_subset) == ["a", "b", "total"]
    assert AUDIT.counts_by_subset["total"].read == len(ROWS)
    for count in AUDIT.counts_by_subset.values():
        assert count.kept + sum(count.refused.values()) + sum(count.bad.values()) == count.read
        assert list(count.refused) == list(Refusal)
        assert list(count.bad) == list(Fault)


def test_an_unknown_verdict_raises() -> None:
    with pytest.raises(AssertionError):
        Audit.from_table("train", pa.Table.from_pylist([*ROWS, kept("b", 1, 1, 1) | {"verdict": "lost"}]))


def test_a_subset_without_pairs_has_zeros() -> None:
    b = AUDIT.counts_by_subset["b"]
    assert (b.read, b.kept, b.longer_wins) == (1, 0, 0.0)
    assert b.tokens["chosen"] == LengthSummary(0.0, 0.0, 0.0, 0)
    assert set(b.cut.values()) == {0.0}


def test_plain_values_are_json() -> None:
    values = AUDIT.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["a"]["refused"]["empty_answer"] == 2


def rendered(audit: Audit) -> list[list[str]]:
    console = Console(width=80, file=io.StringIO())
    with console.capture() as printed:
        console.print(audit.to_rich_table())
    return [line.split() for line in printed.get().splitlines()]


def test_table_shows_only_reasons_that_occurred() -> None:
    lines = rendered(AUDIT)
    for line in (
        ["read", "7", "1", "8"],
        ["refused", "2", "1", "3"],
        ["empty_answer", "2", "2"],
        ["bad", "1", "1"],
        ["kept", "4", "4"],
        ["prompt", "tokens,", "max", "60", "0", "60"],
        ["longer", "answer", "wins", "62.5%", "0.0%", "62.5%"],
    ):
        assert line in lines
    assert not any("not_alternating" in line for line in lines)


def test_table_of_one_subset_has_no_total_and_four_fit_into_a_terminal() -> None:
    alone = Audit.from_table("test", pa.Table.from_pylist(ROWS[:7]))
    assert ["read", "7"] in rendered(alone)
    names = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
    rows = [row | {"subset": name} for name in names for row in ROWS for _ in range(1000)]
    wide = rendered(Audit.from_table("train", pa.Table.from_pylist(rows)))
    assert ["read", *["8,000"] * 4, "32,000"] in wide


def test_lengths_of_nothing() -> None:
    assert LengthSummary.from_lengths(np.array([], dtype=np.int32)) == LengthSummary(0.0, 0.0, 0.0, 0)

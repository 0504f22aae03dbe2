"""Rows of a store as examples."""

from array import array
from collections.abc import Sequence
from math import isnan

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from dpo.models.batch import Example

RowNumbers = NDArray[np.int64]


class PairDataset:
    """Some rows of a store as examples. They are memory-mapped: only row numbers and lengths are in memory.

    Args:
        table: Rows as `dpo.data.store` writes them.
        row_numbers: Which of these rows, in this order.
        split: Name of the split, for the ids: ``subset/split:line``.
        answer_sides: Sides of a pair that an example holds.

    Attributes:
        token_counts: Tokens of each example, prompt and answers.
        answer_token_counts: Tokens of the answers of each example.
    """

    def __init__(self, table: Dataset, row_numbers: RowNumbers, split: str, answer_sides: Sequence[str]) -> None:
        self.table = table
        self.row_numbers = row_numbers
        self.split = split
        self.answer_sides = answer_sides
        prompt_lengths, *answer_lengths = (
            pc.list_value_length(table.data.table[side]).to_numpy().astype(np.int64)[row_numbers]
            for side in ("prompt", *answer_sides)
        )
        answers = np.sum(answer_lengths, axis=0, dtype=np.int64)
        self.answer_token_counts = array("q", answers.tobytes())
        self.token_counts = array("q", (prompt_lengths + answers).tobytes())

    @property
    def max_token_id(self) -> int:
        """The largest token id in the table."""
        columns = (self.table.data.table[side] for side in ("prompt", *self.answer_sides))
        return max(int(pc.max(pc.list_flatten(column)).as_py()) for column in columns)

    def __len__(self) -> int:
        return len(self.row_numbers)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self.table[int(self.row_numbers[index])]
        name = f"{row['subset']}/{self.split}:{row['line']}"
        margin = None if isnan(row["margin"]) else row["margin"]
        answers = tuple(row[side] for side in self.answer_sides)
        return Example(name, row["prompt"], answers, row["weight"], margin, row["turns"])

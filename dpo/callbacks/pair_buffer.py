"""Values of single pairs, kept on the device until they are wanted as rows."""

from dataclasses import dataclass
from itertools import chain
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from dpo.runs.ledger import LEDGER_SCHEMA, VALUE_COLUMNS
from dpo.training.scored_pairs import ScoredPairs

MOST_BUFFERED = 65_536  # pairs; 2 MiB of values on the device, about 20 MiB of names and lengths on the host


@dataclass(frozen=True)
class _Part:
    step: int
    ids: tuple[str, ...]
    turns: tuple[int | None, ...]
    prompt_tokens: tuple[int, ...]
    answer_tokens: tuple[int, ...]  # chosen before rejected
    values: Tensor


class PairBuffer:
    """Takes the values of micro-batches without waiting for the device, and returns them as rows of the ledger."""

    def __init__(self) -> None:
        """Start empty."""
        self._parts: list[_Part] = []
        self.pair_count = 0

    @property
    def is_full(self) -> bool:
        """Whether so many pairs are kept that they should be taken out."""
        return self.pair_count >= MOST_BUFFERED

    def add_pairs(self, pairs: ScoredPairs, step: int) -> None:
        """Keep the values of a micro-batch, which belong to an optimizer step."""
        batch = pairs.batch
        prompts = tuple(group.prompt_length for group in batch.layout.groups)
        self._parts.append(_Part(step, batch.ids, batch.turns, prompts, batch.lengths, pairs.stacked_values()))
        self.pair_count += len(batch)

    def take_rows(self, split: str, last_step: int, trained: bool) -> pa.Table:
        """Return the rows up to a step and keep the later ones; this waits for the device, once.

        Args:
            split: Split of all rows, ``train`` or ``val``.
            last_step: Last optimizer step of the rows that are taken.
            trained: Whether the values are those of training steps.
        """
        parts = [part for part in self._parts if part.step <= last_step]
        self._parts = [part for part in self._parts if part.step > last_step]
        self.pair_count = sum(len(part.ids) for part in self._parts)
        if not parts:
            return LEDGER_SCHEMA.empty_table()
        ids = list(chain.from_iterable(part.ids for part in parts))
        lengths = list(chain.from_iterable(part.answer_tokens for part in parts))
        columns: dict[str, Any] = {
            "step": [part.step for part in parts for _ in part.ids],
            "split": [split] * len(ids),
            "id": ids,
            "subset": [name.rpartition("/")[0] for name in ids],
            "turns": list(chain.from_iterable(part.turns for part in parts)),
            "prompt_tokens": list(chain.from_iterable(part.prompt_tokens for part in parts)),
            "chosen_tokens": lengths[::2],
            "rejected_tokens": lengths[1::2],
            "trained": [trained] * len(ids),
        }
        values = torch.cat([part.values for part in parts]).cpu().numpy()
        for name, column in zip(VALUE_COLUMNS, values.T, strict=True):
            columns[name] = pa.array(column, from_pandas=name.startswith("reference"))  # a NaN there: no reference
        return pa.table({field.name: pa.array(columns[field.name], field.type) for field in LEDGER_SCHEMA})

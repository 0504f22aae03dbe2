"""What all preference data share: tokenised once, split, and given to Lightning step by step.

Takes sources of rows and options; gives Lightning its loaders, and everybody else the audits and tokenised pairs. Where
the rows come from is said by the leaves in `dpo.data.preferences`. Knows nothing of models: of a policy it sees the
tokenizer and the ids that end an answer.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from math import isnan
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from lightning import LightningDataModule
from numpy.typing import NDArray
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from dpo.data import store
from dpo.data.audit import KEPT, Audit
from dpo.data.sampler import Plan, StepLoader
from dpo.data.sources import SPLITS, Source
from dpo.data.tokenization import MIN_LENGTH, Encoder, Format
from dpo.models.batch import Example
from dpo.models.loading import Loader, end_ids

QUICKSTART = "quickstart"
"""The path that stands for generated data."""

OnBadRow = Literal["error", "skip"]


def cache_folder() -> Path:
    """Where files lie that can be made again."""
    return Path(os.environ.get("DPO_CACHE", "~/.cache/dpo-lightning")).expanduser()


def check(name: str, value: object, holds: bool, expected: str) -> None:
    """Refuse a value of an option.

    Raises:
        ValueError: It does not hold.
    """
    if not holds:
        raise ValueError(f"--data.{name}: expected {expected}, got {value!r}.")


class TextData(LightningDataModule):
    """Text for one model.

    Attributes:
        path: Where it comes from, in words.
    """

    path: str

    def __init__(
        self,
        tokenizer: str = QUICKSTART,
        max_length: int = 512,
        batch_size: int = 8,
        limit: int | None = None,
        format: Format = "auto",
        on_bad_row: OnBadRow = "error",
        seed: int = 0,
    ) -> None:
        """Choose how it is read.

        Args:
            tokenizer: Hub id or folder of the tokenizer, as a rule the policy's.
            max_length: Most tokens of prompt + answer; `dpo.data.tokenization.Encoder` says what is cut first.
            batch_size: Pairs per optimizer step, over all devices and accumulated batches.
            limit: Read only so many rows of each file, train and test, from its start. None: all.
            format: ``hh`` keeps the dialogue's text, ``chat`` uses the tokenizer's chat template, ``auto`` does so
                where there is one.
            on_bad_row: Stop at an unreadable row (``error``), or leave it out and count it (``skip``).
            seed: Of everything that is drawn: the order of training pairs, sampled answers.

        Raises:
            ValueError: An option has no such value.
        """
        super().__init__()
        check("max_length", max_length, max_length >= MIN_LENGTH, f"at least {MIN_LENGTH} tokens")
        check("batch_size", batch_size, batch_size >= 1, "at least 1 pair")
        check("limit", limit, limit is None or limit >= 1, "at least 1 row, or null for all")
        check("format", format, format in get_args(Format), f"one of {get_args(Format)}")
        check("on_bad_row", on_bad_row, on_bad_row in get_args(OnBadRow), f"one of {get_args(OnBadRow)}")
        check("seed", seed, seed >= 0, "at least 0")
        self.tokenizer_name, self.max_length, self.format, self.seed = tokenizer, max_length, format, seed
        self.batch_size, self.limit, self.skip_bad = batch_size, limit, on_bad_row == "skip"

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The loaded tokenizer."""
        return Loader().tokenizer(self.tokenizer_name)

    @cached_property
    def encoder(self) -> Encoder:
        """What makes tokens of pairs; its `end_ids` end an answer."""
        return Encoder(self.tokenizer, self.max_length, self.format, end_ids(self.tokenizer_name))


RowNumbers = NDArray[np.int64]


class PairDataset:
    """Some rows of a store as examples, memory-mapped: only row numbers and lengths are in memory.

    Args:
        table: Rows as `dpo.data.store` writes them.
        rows: Which of them, in this order.
        split: For the ids: ``subset/split:line``.
        answers: Which sides of a pair an example holds.

    Attributes:
        costs: Tokens of each example, prompt and answers.
        scored: Tokens of its answers.
    """

    def __init__(self, table: Dataset, rows: RowNumbers, split: str, answers: Sequence[str]) -> None:
        self.table, self.rows, self.split, self.answers = table, rows, split, answers
        prompt, *sides = (
            pc.list_value_length(table.data.table[side]).to_numpy().astype(np.int64)[rows]
            for side in ("prompt", *answers)
        )
        scored = np.sum(sides, axis=0, dtype=np.int64)
        self.scored = array("q", scored.tobytes())
        self.costs = array("q", (prompt + scored).tobytes())

    @property
    def largest(self) -> int:
        """The largest token id of the table."""
        columns = (self.table.data.table[side] for side in ("prompt", *self.answers))
        return max(int(pc.max(pc.list_flatten(column)).as_py()) for column in columns)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self.table[int(self.rows[index])]
        name = f"{row['subset']}/{self.split}:{row['line']}"
        margin = None if isnan(row["margin"]) else row["margin"]
        return Example(name, row["prompt"], tuple(row[side] for side in self.answers), row["weight"], margin)


class PairData(TextData, ABC):
    """Preference pairs for training and evaluation.

    Tokenised once into ``$DPO_CACHE`` (default ``~/.cache/dpo-lightning``), in a folder named by the hash of all that
    decides the tokens, and memory-mapped from there.

    Args:
        tokenizer: Hub id or folder of the tokenizer, as a rule the policy's.
        max_tokens: Most tokens of one forward pass, prompts counted once. None: no bound.
        shuffle: A new order of the training pairs every epoch; otherwise the order of the files.
        val_fraction: Share of the openings (first human turns) of train whose pairs are the validation split; an
            opening is never in both. 0: no validation split.
        answers: Sides of a pair that the stage of training wants, in this order.
        options: See `dpo.data.datamodule.TextData`.

    Raises:
        ValueError: An option has no such value; later, while reading, a row, file or tokenizer cannot be used. The
            message says where and what to do.
    """

    def __init__(
        self,
        tokenizer: str = QUICKSTART,
        max_tokens: int | None = 16384,
        shuffle: bool = True,
        val_fraction: float = 0.1,
        answers: Sequence[str] = ("chosen", "rejected"),
        **options: object,
    ) -> None:
        super().__init__(tokenizer, **options)  # type: ignore[arg-type]  # the command line checks them
        check("max_tokens", max_tokens, max_tokens is None or max_tokens >= 1, "at least 1 token, or null")
        check("val_fraction", val_fraction, 0 <= val_fraction < 1, "a share from 0 to less than 1")
        self.max_tokens, self.shuffle, self.val_fraction = max_tokens, shuffle, val_fraction
        self.answers = answers
        self.audits: dict[str, Audit] = {}
        self.pairs: dict[str, PairDataset] = {}

    @abstractmethod
    def sources(self, fetch: bool) -> list[Source]:
        """Where the rows are, train before test in every subset; `fetch` as long as nothing is known of them."""

    def order(self, subsets: NDArray[np.object_], rows: RowNumbers) -> RowNumbers:
        """The training pairs of an epoch, out of the subset of every row and the rows that are kept."""
        return rows

    def prepare_data(self) -> None:
        """Fetch and tokenise what is not there yet, in one process; print the audits.

        Raises:
            ValueError: Something cannot be read, or nothing is left of it; nothing is written then.
        """
        sources = self.sources(fetch=True)
        folder = self._folder(sources)
        if not folder.is_dir():
            store.build(folder, sources, self.encoder, self.limit, self.skip_bad)
        for split in _splits(sources):
            Console().print(store.audit(folder, split).table())

    def setup(self, stage: str) -> None:
        """Open the store, in every process.

        Raises:
            ValueError: Validation is asked for and `val_fraction` is 0; or only some of the pairs have a margin.
        """
        if not self.val_fraction:
            check("val_fraction", self.val_fraction, stage != "validate", "more than 0, to validate")
            if self.trainer:
                self.trainer.limit_val_batches = 0  # the one way to tell Lightning so without a warning
        if self.pairs:
            return
        sources = self.sources(fetch=False)
        self.folder = folder = self._folder(sources)
        self.audits = {split: store.audit(folder, split) for split in _splits(sources)}
        for split in self.audits:
            self._open(store.load(folder, split), split)

    @property
    def training_sha256(self) -> str:
        """SHA-256 of the training pairs, in the order of an epoch that is not shuffled."""
        digest = hashlib.sha256(self.folder.name.encode())
        if "train" in self.pairs:
            digest.update(self.pairs["train"].rows.tobytes())
        return digest.hexdigest()

    def _open(self, table: Dataset, split: str) -> None:
        columns = {name: table.data.table[name].to_numpy() for name in ("verdict", "opening", "subset", "margin")}
        kept = columns["verdict"] == KEPT
        unknown = np.isnan(columns["margin"][kept])
        if unknown.any() and not unknown.all():
            raise ValueError(
                f"a margin is given for {(~unknown).sum()} of {len(unknown)} pairs of {split}: give one for every "
                "pair, or leave them out with --data.columns.margin= (nothing)."
            )
        held_out = columns["opening"] < self.val_fraction if split == "train" else np.zeros_like(kept)
        for name, wanted in ((split, kept & ~held_out), ("val", kept & held_out)):
            if wanted.any():
                rows = np.flatnonzero(wanted)
                rows = self.order(columns["subset"], rows) if name == "train" else rows
                self.pairs[name] = PairDataset(table, rows, split, self.answers)

    def kept(self, name: str) -> PairDataset:
        """The pairs of train, val or test.

        Raises:
            ValueError: There are none.
        """
        if name not in self.pairs:
            raise ValueError(
                f"No pair is left for {name!r} of {self.path}: see the table of what was read; "
                "more rows (--data.limit, --data.subsets) or another --data.val_fraction may help."
            )
        return self.pairs[name]

    def train_dataloader(self) -> StepLoader:
        """Steps over the training pairs."""
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        self.train_loader = self._loader("train", shuffle=self.shuffle, accumulate=accumulate)
        return self.train_loader

    def val_dataloader(self) -> StepLoader | list[StepLoader]:
        """Steps over the validation pairs, in order; without a validation split, none."""
        return self._loader("val") if self.val_fraction else []

    def test_dataloader(self) -> StepLoader:
        """Steps over the test pairs, in order."""
        return self._loader("test")

    def predict_dataloader(self) -> StepLoader:
        """Steps over the test pairs, in order."""
        return self._loader("test")

    def texts(self, name: str, most: int) -> list[dict[str, str]]:
        """The first examples of a split as text: the prompt, and every answer under the name of its side."""
        if name not in self.pairs:
            return []
        pairs, sides = self.pairs[name], ("prompt", *self.answers)
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        return [
            {side: str(decode(list(ids))) for side, ids in zip(sides, (pair.prompt, *pair.answers), strict=True)}
            for pair in map(pairs.__getitem__, range(min(most, len(pairs))))
        ]

    def _loader(self, name: str, shuffle: bool = False, accumulate: int = 1) -> StepLoader:
        pairs = self.kept(name)
        plan = Plan(
            self.batch_size, self.max_tokens, shuffle, self.seed, accumulate=accumulate, keep_rest=name != "train"
        )
        if self.trainer:
            plan = replace(plan, rank=self.trainer.global_rank, world_size=self.trainer.world_size)
        return StepLoader(pairs, plan)

    def _folder(self, sources: Sequence[Source]) -> Path:
        return cache_folder() / f"tokens-{store.key(sources, self.encoder, self.limit, self.skip_bad)}"


def _splits(sources: Sequence[Source]) -> list[str]:
    return [split for split in SPLITS if any(source.split == split for source in sources)]

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
from dpo.data.audit import KEPT_VERDICT, Audit
from dpo.data.sampler import EpochPlan, StepLoader
from dpo.data.sources import SPLITS, SourceFile
from dpo.data.tokenization import MIN_LENGTH, PairEncoder, TextFormat
from dpo.models.batch import Example
from dpo.models.loading import ModelLoader, read_end_ids

QUICKSTART_NAME = "quickstart"
"""The path that stands for generated data."""

OnBadRow = Literal["error", "skip"]


def cache_folder() -> Path:
    """Where files lie that can be made again."""
    return Path(os.environ.get("DPO_CACHE", "~/.cache/dpo-lightning")).expanduser()


def check_option(name: str, value: object, is_valid: bool, expected: str) -> None:
    """Refuse a value of an option.

    Raises:
        ValueError: It does not hold.
    """
    if not is_valid:
        raise ValueError(f"--data.{name}: expected {expected}, got {value!r}.")


class TextData(LightningDataModule):
    """Text for one model.

    Attributes:
        path: Where it comes from, in words.
    """

    path: str

    def __init__(
        self,
        tokenizer: str = QUICKSTART_NAME,
        max_length: int = 512,
        batch_size: int = 8,
        limit: int | None = None,
        format: TextFormat = "auto",
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
        check_option("max_length", max_length, max_length >= MIN_LENGTH, f"at least {MIN_LENGTH} tokens")
        check_option("batch_size", batch_size, batch_size >= 1, "at least 1 pair")
        check_option("limit", limit, limit is None or limit >= 1, "at least 1 row, or null for all")
        check_option("format", format, format in get_args(TextFormat), f"one of {get_args(TextFormat)}")
        check_option("on_bad_row", on_bad_row, on_bad_row in get_args(OnBadRow), f"one of {get_args(OnBadRow)}")
        check_option("seed", seed, seed >= 0, "at least 0")
        self.tokenizer_name, self.max_length, self.format, self.seed = tokenizer, max_length, format, seed
        self.batch_size, self.limit, self.skip_bad_rows = batch_size, limit, on_bad_row == "skip"

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The loaded tokenizer."""
        return ModelLoader().load_tokenizer(self.tokenizer_name)

    @cached_property
    def encoder(self) -> PairEncoder:
        """What makes tokens of pairs; its `end_ids` end an answer."""
        return PairEncoder(self.tokenizer, self.max_length, self.format, read_end_ids(self.tokenizer_name))


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

    def __init__(self, table: Dataset, row_numbers: RowNumbers, split: str, answer_sides: Sequence[str]) -> None:
        self.table, self.row_numbers, self.split, self.answer_sides = table, row_numbers, split, answer_sides
        prompt, *sides = (
            pc.list_value_length(table.data.table[side]).to_numpy().astype(np.int64)[row_numbers]
            for side in ("prompt", *answer_sides)
        )
        scored = np.sum(sides, axis=0, dtype=np.int64)
        self.answer_token_counts = array("q", scored.tobytes())
        self.token_counts = array("q", (prompt + scored).tobytes())

    @property
    def max_token_id(self) -> int:
        """The largest token id of the table."""
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
        return Example(name, row["prompt"], tuple(row[side] for side in self.answer_sides), row["weight"], margin)


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
        tokenizer: str = QUICKSTART_NAME,
        max_tokens: int | None = 16384,
        shuffle: bool = True,
        val_fraction: float = 0.1,
        answers: Sequence[str] = ("chosen", "rejected"),
        **options: object,
    ) -> None:
        super().__init__(tokenizer, **options)  # type: ignore[arg-type]  # the command line checks them
        check_option("max_tokens", max_tokens, max_tokens is None or max_tokens >= 1, "at least 1 token, or null")
        check_option("val_fraction", val_fraction, 0 <= val_fraction < 1, "a share from 0 to less than 1")
        self.max_tokens, self.shuffle, self.val_fraction = max_tokens, shuffle, val_fraction
        self.answers = answers
        self.audits_by_split: dict[str, Audit] = {}
        self.pairs_by_split: dict[str, PairDataset] = {}

    @abstractmethod
    def list_sources(self, fetch: bool) -> list[SourceFile]:
        """Where the rows are, train before test in every subset; `fetch` as long as nothing is known of them."""

    def order_training_rows(self, subsets: NDArray[np.object_], rows: RowNumbers) -> RowNumbers:
        """The training pairs of an epoch, out of the subset of every row and the rows that are kept."""
        return rows

    def prepare_data(self) -> None:
        """Fetch and tokenise what is not there yet, in one process; print the audits.

        Raises:
            ValueError: Something cannot be read, or nothing is left of it; nothing is written then.
        """
        sources = self.list_sources(fetch=True)
        folder = self._folder(sources)
        if not folder.is_dir():
            store.build_store(folder, sources, self.encoder, self.limit, self.skip_bad_rows)
        for split in _splits(sources):
            Console().print(store.audit_split(folder, split).to_rich_table())

    def setup(self, stage: str) -> None:
        """Open the store, in every process.

        Raises:
            ValueError: Validation is asked for and `val_fraction` is 0; or only some of the pairs have a margin.
        """
        if not self.val_fraction:
            check_option("val_fraction", self.val_fraction, stage != "validate", "more than 0, to validate")
            if self.trainer:
                self.trainer.limit_val_batches = 0  # the one way to tell Lightning so without a warning
        if self.pairs_by_split:
            return
        sources = self.list_sources(fetch=False)
        self.store_folder = folder = self._folder(sources)
        self.audits_by_split = {split: store.audit_split(folder, split) for split in _splits(sources)}
        for split in self.audits_by_split:
            self._open(store.load_split(folder, split), split)

    @property
    def training_sha256(self) -> str:
        """SHA-256 of the training pairs, in the order of an epoch that is not shuffled."""
        digest = hashlib.sha256(self.store_folder.name.encode())
        if "train" in self.pairs_by_split:
            digest.update(self.pairs_by_split["train"].row_numbers.tobytes())
        return digest.hexdigest()

    def _open(self, table: Dataset, split: str) -> None:
        columns = {name: table.data.table[name].to_numpy() for name in ("verdict", "opening", "subset", "margin")}
        kept = columns["verdict"] == KEPT_VERDICT
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
                rows = self.order_training_rows(columns["subset"], rows) if name == "train" else rows
                self.pairs_by_split[name] = PairDataset(table, rows, split, self.answers)

    def require_pairs(self, split: str) -> PairDataset:
        """The pairs of train, val or test.

        Raises:
            ValueError: There are none.
        """
        if split not in self.pairs_by_split:
            raise ValueError(
                f"No pair is left for {split!r} of {self.path}: see the table of what was read; "
                "more rows (--data.limit, --data.subsets) or another --data.val_fraction may help."
            )
        return self.pairs_by_split[split]

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

    def example_texts(self, split: str, max_examples: int) -> list[dict[str, str]]:
        """The first examples of a split as text: the prompt, and every answer under the name of its side."""
        if split not in self.pairs_by_split:
            return []
        pairs, sides = self.pairs_by_split[split], ("prompt", *self.answers)
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        return [
            {side: str(decode(list(ids))) for side, ids in zip(sides, (pair.prompt, *pair.answers), strict=True)}
            for pair in map(pairs.__getitem__, range(min(max_examples, len(pairs))))
        ]

    def _loader(self, name: str, shuffle: bool = False, accumulate: int = 1) -> StepLoader:
        pairs = self.require_pairs(name)
        plan = EpochPlan(
            self.batch_size,
            self.max_tokens,
            shuffle,
            self.seed,
            accumulate_batches=accumulate,
            keep_partial_step=name != "train",
        )
        if self.trainer:
            plan = replace(plan, rank=self.trainer.global_rank, world_size=self.trainer.world_size)
        return StepLoader(pairs, plan)

    def _folder(self, sources: Sequence[SourceFile]) -> Path:
        return cache_folder() / f"tokens-{store.store_sha256(sources, self.encoder, self.limit, self.skip_bad_rows)}"


def _splits(sources: Sequence[SourceFile]) -> list[str]:
    return [split for split in SPLITS if any(source.split == split for source in sources)]

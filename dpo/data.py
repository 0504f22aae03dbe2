"""`HHRLHF`: preference dialogues, from a folder or the hub to the steps of training and evaluation.

Takes names and options; gives Lightning its loaders, and everybody else the audits and tokenised pairs. Knows
nothing of models: of a policy it sees the tokenizer and the ids that end an answer.
"""

import os
from array import array
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from lightning import LightningDataModule
from numpy.typing import NDArray
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from dpo import quickstart, store
from dpo.audit import KEPT, Audit
from dpo.batch import Example
from dpo.models import Loader, end_ids
from dpo.rows import SPLITS, Source, download, find
from dpo.sampler import Plan, StepLoader
from dpo.tokens import MIN_LENGTH, Encoder, Format

QUICKSTART = "quickstart"
"""The path that stands for generated data."""

OnBadRow = Literal["error", "skip"]


class PairDataset:
    """Some rows of a store as examples, memory-mapped: only row numbers and lengths are in memory.

    Args:
        table: Rows as `dpo.store` writes them.
        rows: Which of them, in this order.
        split: For the ids: ``subset/split:line``.
        answers: Which sides of a pair an example holds.

    Attributes:
        costs: Tokens of each example, prompt and answers.
        scored: Tokens of its answers.
    """

    def __init__(self, table: Dataset, rows: NDArray[np.int64], split: str, answers: Sequence[str]) -> None:
        self.table, self.rows, self.split, self.answers = table, rows, split, answers
        prompt, *sides = (
            pc.list_value_length(table.data.table[side]).to_numpy().astype(np.int64)[rows]
            for side in ("prompt", *answers)
        )
        scored = np.sum(sides, axis=0, dtype=np.int64)
        self.scored = array("q", scored.tobytes())
        self.costs = array("q", (prompt + scored).tobytes())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self.table[int(self.rows[index])]
        name = f"{row['subset']}/{self.split}:{row['line']}"
        return Example(name, row["prompt"], tuple(row[side] for side in self.answers))


class HHRLHF(LightningDataModule):
    """Anthropic's hh-rlhf, or anything in its layout and text format.

    Tokenised once into ``$DPO_CACHE`` (default ``~/.cache/dpo-lightning``), in a folder named by the hash of
    all that decides the tokens, and memory-mapped from there.

    Args:
        tokenizer: Hub id or folder of the tokenizer, as a rule the policy's.
        path: Hub id (``Anthropic/hh-rlhf``) or folder with ``<subset>/{train,test}.jsonl.gz``; ``quickstart``
            generates data that needs neither network nor file.
        subsets: Which of them, in this order; all that are there by default.
        max_length: Most tokens of prompt + answer; `dpo.tokens.Encoder` says what is cut first.
        batch_size: Pairs per optimizer step, over all devices and accumulated batches.
        max_tokens: Most tokens of one forward pass, prompts counted once. None: no bound.
        shuffle: A new order of the training pairs every epoch; otherwise the order of the files.
        val_fraction: Share of the openings (first human turns) of train whose pairs are the validation split;
            an opening is never in both. 0: no validation split.
        limit: Read only so many rows of each file, train and test, from its start. None: all.
        format: ``hh`` keeps the dialogue's text, ``chat`` uses the tokenizer's chat template, ``auto`` does
            so where there is one.
        on_bad_row: Stop at an unreadable row (``error``), or leave it out and count it (``skip``).
        seed: Of the order of the training pairs.
        answers: Sides of a pair that the stage of training wants, in this order.

    Raises:
        ValueError: An option has no such value; later, while reading, a row, file, subset or tokenizer cannot
            be used. The message says where and what to do.
    """

    def __init__(
        self,
        tokenizer: str = QUICKSTART,
        path: str = QUICKSTART,
        subsets: list[str] | None = None,
        max_length: int = 512,
        batch_size: int = 8,
        max_tokens: int | None = 16384,
        shuffle: bool = True,
        val_fraction: float = 0.1,
        limit: int | None = None,
        format: Format = "auto",
        on_bad_row: OnBadRow = "error",
        seed: int = 0,
        answers: Sequence[str] = ("chosen", "rejected"),
    ) -> None:
        super().__init__()
        unique = subsets is None or len(set(subsets)) == len(subsets) > 0
        _check("subsets", subsets, unique, "some names, each once, or nothing for all")
        _check("max_length", max_length, max_length >= MIN_LENGTH, f"at least {MIN_LENGTH} tokens")
        _check("batch_size", batch_size, batch_size >= 1, "at least 1 pair")
        _check("max_tokens", max_tokens, max_tokens is None or max_tokens >= 1, "at least 1 token, or null")
        _check("val_fraction", val_fraction, 0 <= val_fraction < 1, "a share from 0 to less than 1")
        _check("limit", limit, limit is None or limit >= 1, "at least 1 row, or null for all")
        _check("format", format, format in get_args(Format), f"one of {get_args(Format)}")
        _check("on_bad_row", on_bad_row, on_bad_row in get_args(OnBadRow), f"one of {get_args(OnBadRow)}")
        _check("seed", seed, seed >= 0, "at least 0")
        self.path, self.subsets, self.limit, self.skip_bad = path, subsets, limit, on_bad_row == "skip"
        self.max_length, self.format, self.val_fraction = max_length, format, val_fraction
        self.batch_size, self.max_tokens, self.shuffle, self.seed = batch_size, max_tokens, shuffle, seed
        self.tokenizer_name, self.answers = tokenizer, answers
        self.audits: dict[str, Audit] = {}
        self.pairs: dict[str, PairDataset] = {}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The loaded tokenizer."""
        return Loader().tokenizer(self.tokenizer_name)

    @cached_property
    def encoder(self) -> Encoder:
        """What makes tokens of pairs; its `end_ids` end an answer."""
        return Encoder(self.tokenizer, self.max_length, self.format, end_ids(self.tokenizer_name))

    def prepare_data(self) -> None:
        """Fetch and tokenise what is not there yet, in one process; print the audits.

        Raises:
            ValueError: Something cannot be read, or nothing is left of it; nothing is written then.
        """
        sources = self._sources(fetch=True)
        folder = self._folder(sources)
        if not folder.is_dir():
            store.build(folder, sources, self.encoder, self.limit, self.skip_bad)
        for split in _splits(sources):
            Console().print(store.audit(folder, split).table())

    def setup(self, stage: str) -> None:
        """Open the store, in every process.

        Raises:
            ValueError: Validation is asked for and `val_fraction` is 0.
        """
        if not self.val_fraction:
            _check("val_fraction", self.val_fraction, stage != "validate", "more than 0, to validate")
            if self.trainer:
                self.trainer.limit_val_batches = 0  # the one way to tell Lightning so without a warning
        if self.pairs:
            return
        sources = self._sources(fetch=False)
        folder = self._folder(sources)
        self.audits = {split: store.audit(folder, split) for split in _splits(sources)}
        for split in self.audits:
            table = store.load(folder, split)
            kept = pc.equal(table.data.table["verdict"], KEPT).to_numpy()
            opening = table.data.table["opening"].to_numpy()
            held_out = opening < self.val_fraction if split == "train" else np.zeros_like(kept)
            for name, wanted in ((split, kept & ~held_out), ("val", kept & held_out)):
                if wanted.any():
                    self.pairs[name] = PairDataset(table, np.flatnonzero(wanted), split, self.answers)

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
        pairs = self.pairs.get(name, ())
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        return [
            {"prompt": decode(pair.prompt), **dict(zip(self.answers, map(decode, pair.answers), strict=True))}
            for pair in islice(pairs, most)
        ]

    def _loader(self, name: str, shuffle: bool = False, accumulate: int = 1) -> StepLoader:
        if name not in self.pairs:
            raise ValueError(
                f"No pair is left for {name!r} of {self.path}: see the table of what was read; "
                "more rows (--data.limit, --data.subsets) or another --data.val_fraction may help."
            )
        plan = Plan(
            self.batch_size, self.max_tokens, shuffle, self.seed, accumulate=accumulate, keep_rest=name != "train"
        )
        if self.trainer:
            plan = replace(plan, rank=self.trainer.global_rank, world_size=self.trainer.world_size)
        return StepLoader(self.pairs[name], plan)

    def _sources(self, fetch: bool) -> list[Source]:
        if self.path == QUICKSTART:
            folder = cache_folder() / QUICKSTART
            if fetch:
                rows = {"train": quickstart.TRAIN_ROWS, "test": quickstart.TEST_ROWS}
                quickstart.write(folder, quickstart.DPO_SEED, **rows)
        else:
            folder = Path(self.path).expanduser()
            if not folder.is_dir():
                folder = download(self.path, self.subsets, local_only=not fetch)
        return find(folder, self.subsets)

    def _folder(self, sources: Sequence[Source]) -> Path:
        return cache_folder() / f"tokens-{store.key(sources, self.encoder, self.limit, self.skip_bad)}"


def _check(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"--data.{name}: expected {expected}, got {value!r}.")


def cache_folder() -> Path:
    """Where files lie that can be made again."""
    return Path(os.environ.get("DPO_CACHE", "~/.cache/dpo-lightning")).expanduser()


def _splits(sources: Sequence[Source]) -> list[str]:
    return [split for split in SPLITS if any(source.split == split for source in sources)]

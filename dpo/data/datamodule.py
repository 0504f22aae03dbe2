"""The Lightning data module that all preference data share: rows are tokenized once, split, and loaded step by step.

Subclasses in `dpo.data.preferences` say where the rows come from. Of the policy, only the tokenizer and the token ids
that end an answer are used.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from datasets import Dataset
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from dpo.data import store
from dpo.data.audit import KEPT_VERDICT, Audit
from dpo.data.exclusion import Exclusion
from dpo.data.pair_dataset import PairDataset, RowNumbers
from dpo.data.sampler import EpochPlan, StepLoader
from dpo.data.shortage import missing_pairs_message, plain_hint
from dpo.data.sources import SourceFile, splits_of
from dpo.data.tokenization import MIN_LENGTH, PairEncoder, TextFormat
from dpo.files import sweep_folder
from dpo.models.loading import ModelLoader, read_end_ids

QUICKSTART_NAME = "quickstart"
"""The path that selects the generated data of the quickstart."""

OnBadRow = Literal["error", "skip"]


def cache_folder() -> Path:
    """Return the folder of files that can be computed again: ``$DPO_CACHE`` or ``~/.cache/dpo-lightning``."""
    return Path(os.environ.get("DPO_CACHE", "~/.cache/dpo-lightning")).expanduser()


def check_option(name: str, value: object, is_valid: bool, expected: str) -> None:
    """Check the value of a command-line option.

    Args:
        name: Name of the option, without ``--data.``.
        value: Its value.
        is_valid: Whether the value is valid.
        expected: What a valid value is, for the error message.

    Raises:
        ValueError: The value is invalid.
    """
    if not is_valid:
        raise ValueError(f"--data.{name}: expected {expected}, got {value!r}.")


class TextData(LightningDataModule):
    """A data module of text that is tokenized for one model.

    Attributes:
        path: Where the text comes from, for messages.
    """

    path: str

    def __init__(
        self,
        tokenizer: str | None = None,
        max_length: int = 512,
        batch_size: int = 8,
        limit: int | None = None,
        format: TextFormat = "auto",
        on_bad_row: OnBadRow = "error",
        seed: int = 0,
    ) -> None:
        """Choose how text is read and tokenized.

        Args:
            tokenizer: Hub id or folder of the tokenizer. Default: the tokenizer of the policy that the trainer trains.
            max_length: Maximum tokens of prompt + answer. A longer pair loses its oldest exchanges first, then the
                start of the prompt; an answer is cut only if it does not fit alone.
            batch_size: Pairs per optimizer step, over all devices and accumulated batches.
            limit: Maximum number of rows to read from each file, train and test, from its start. None: all.
            format: ``hh`` keeps the text of a dialogue, ``chat`` uses the tokenizer's chat template, ``plain`` takes
                text as it stands, ``auto`` is ``chat`` if there is a template and ``hh`` otherwise.
            on_bad_row: Stop at an unreadable row (``error``), or leave it out and count it (``skip``).
            seed: Seed of the order of training pairs and of sampled answers.

        Raises:
            ValueError: An option has an invalid value.
        """
        super().__init__()
        check_option("max_length", max_length, max_length >= MIN_LENGTH, f"at least {MIN_LENGTH} tokens")
        check_option("batch_size", batch_size, batch_size >= 1, "at least 1 pair")
        check_option("limit", limit, limit is None or limit >= 1, "at least 1 row, or null for all")
        check_option("format", format, format in get_args(TextFormat), f"one of {get_args(TextFormat)}")
        check_option("on_bad_row", on_bad_row, on_bad_row in get_args(OnBadRow), f"one of {get_args(OnBadRow)}")
        check_option("seed", seed, seed >= 0, "at least 0")
        self.given_tokenizer = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.limit = limit
        self.format = format
        self.skip_bad_rows = on_bad_row == "skip"
        self.seed = seed
        self._encoders: dict[str, PairEncoder] = {}

    @property
    def tokenizer_name(self) -> str:
        """Hub id or folder of the tokenizer: the policy's, or without a trainer the one that was given.

        Raises:
            ValueError: Neither exists, or the given one is not the policy's.
        """
        policy = getattr(self.trainer.lightning_module if self.trainer else None, "policy_path", None)
        if policy is None and self.given_tokenizer is None:
            raise ValueError(
                "--data.tokenizer: expected the folder or hub id of a tokenizer, got none, and there is no trainer "
                "whose policy has one: pass the data to a Trainer first, or name a tokenizer."
            )
        if None not in (policy, self.given_tokenizer) and policy != self.given_tokenizer:
            raise ValueError(
                f"--data.tokenizer: expected none, got {self.given_tokenizer!r}: the tokenizer is the one that comes "
                f"with --model.policy ({policy}). Leave the option out, or put the tokenizer's files into the policy's "
                "folder."
            )
        return str(policy or self.given_tokenizer)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the encoder."""
        return self.encoder.tokenizer

    @property
    def encoder(self) -> PairEncoder:
        """The encoder that tokenizes dialogues; created on first use."""
        name = self.tokenizer_name
        if name not in self._encoders:
            self._encoders[name] = self.make_encoder(ModelLoader().load_tokenizer(name), read_end_ids(name))
        return self._encoders[name]

    def make_encoder(self, tokenizer: PreTrainedTokenizerBase, end_ids: list[int]) -> PairEncoder:
        """Create the encoder for a tokenizer and the token ids that end an answer."""
        return PairEncoder(tokenizer, self.max_length, self.format, end_ids)


class PairData(TextData, ABC):
    """Preference pairs for training and evaluation.

    They are tokenized once into ``$DPO_CACHE`` (default ``~/.cache/dpo-lightning``), in a folder named by the hash of
    everything that decides the tokens, and memory-mapped from there.

    Attributes:
        answer_sides: Sides of a pair that an example holds; `setup` takes them from the trainer's module.
        audits_by_split: Counts of the rows of train and test that were read, kept and refused.
        pairs_by_split: Examples of train, val and test; a split without any is missing.
        exclusion: Pairs that are left out.
        store_folder: Folder of the tokens; available from `setup` on.
        train_loader: The last loader that `train_dataloader` returned.
    """

    def __init__(
        self,
        tokenizer: str | None,
        max_length: int,
        batch_size: int,
        max_tokens: int | None,
        shuffle: bool,
        val_fraction: float,
        limit: int | None,
        format: TextFormat,
        on_bad_row: OnBadRow,
        seed: int,
        exclude: list[str] | str | None,
    ) -> None:
        """Set the options that all preference data share; `dpo.HHRLHF` describes them.

        Raises:
            ValueError: An option has an invalid value.
        """
        super().__init__(tokenizer, max_length, batch_size, limit, format, on_bad_row, seed)
        check_option("max_tokens", max_tokens, max_tokens is None or max_tokens >= 1, "at least 1 token, or null")
        check_option("val_fraction", val_fraction, 0 <= val_fraction < 1, "a share from 0 to less than 1")
        self.max_tokens = max_tokens
        self.shuffle = shuffle
        self.val_fraction = val_fraction
        self.answer_sides: tuple[str, ...] = ("chosen", "rejected")
        self.audits_by_split: dict[str, Audit] = {}
        self.pairs_by_split: dict[str, PairDataset] = {}
        self.exclusion = Exclusion.from_option(exclude)
        self._training_rows: RowNumbers = np.empty(0, np.int64)  # with those that are left out
        self._left_out: tuple[int, ...] = ()
        self._opened_for: tuple[Any, ...] = ()
        self._cut_fraction = val_fraction
        self._validates = val_fraction > 0

    @abstractmethod
    def list_sources(self, fetch: bool) -> list[SourceFile]:
        """List the files to read, train before test in every subset.

        Args:
            fetch: Download files, or list remote ones, if needed; otherwise use what an earlier call has fetched.
        """

    def order_training_rows(self, subsets: NDArray[np.object_], rows: RowNumbers) -> RowNumbers:
        """Return the training rows of an epoch: here each kept row once, in the order of the files.

        Args:
            subsets: Name of the subset of every row of the store.
            rows: Numbers of the rows that are kept for training.
        """
        return rows

    def prepare_data(self) -> None:
        """Download and tokenize what is missing, in one process, and print the audits.

        Raises:
            ValueError: A file or a row cannot be read; nothing is written then.
        """
        sources = self.list_sources(fetch=True)
        folder = self._folder(sources)
        rank_zero_info(f"Format: {self.encoder.format_reason}.")
        if own := [Path(source.file).name for source in sources if source.split == "val"]:
            rank_zero_info(f"Validation: the pairs of {', '.join(own)}; none are cut from train (--data.val_fraction).")
        sweep_folder(cache_folder())
        damage = store.find_damage(folder) if folder.is_dir() else ""
        if damage:
            rank_zero_warn(f"{damage}. The rows are tokenized again.")
        if damage or not folder.is_dir():
            store.build_store(folder, sources, self.encoder, self.limit, self.skip_bad_rows)
        for split in splits_of(sources):
            Console().print(store.audit_split(folder, split, self.exclusion).to_rich_table())

    def is_tokenized(self) -> bool:
        """Return whether the tokens are there already, so that `setup` can open them; nothing is downloaded."""
        try:
            return self._folder(self.list_sources(fetch=False)).is_dir()
        except (OSError, ValueError):  # sources that were never fetched
            return False

    def setup(self, stage: str) -> None:
        """Open the store in every process.

        Raises:
            ValueError: The stage is validation, no file is for it and `val_fraction` is 0; or only some of the pairs
                have a margin.
        """
        sources = self.list_sources(fetch=False)
        self._cut_fraction = 0.0 if "val" in splits_of(sources) else self.val_fraction
        self._validates = self._cut_fraction > 0 or "val" in splits_of(sources)
        if not self._validates:
            check_option("val_fraction", self.val_fraction, stage != "validate", "more than 0, to validate")
            if self.trainer:
                self.trainer.limit_val_batches = 0  # the only way to skip validation without a warning
        module = self.trainer.lightning_module if self.trainer else None
        self.answer_sides = getattr(module, "answer_sides", self.answer_sides)
        folder = self._folder(sources)
        if self._opened_for == (folder, self.answer_sides):
            return
        self._opened_for = (folder, self.answer_sides)
        self.store_folder = folder
        self.pairs_by_split = {}
        self.exclusion.require_splits(splits_of(sources))
        self.audits_by_split = {split: store.audit_split(folder, split, self.exclusion) for split in splits_of(sources)}
        for split in self.audits_by_split:
            self._open(store.load_split(folder, split), split)

    @property
    def training_sha256(self) -> str:
        """SHA-256 of the training pairs, with those left out, in the order of an epoch that is not shuffled."""
        digest = hashlib.sha256(self.store_folder.name.encode())
        digest.update(self._training_rows.tobytes())
        return digest.hexdigest()

    def _open(self, table: Dataset, split: str) -> None:
        columns = {name: table.data.table[name].to_numpy() for name in ("verdict", "opening", "subset", "margin")}
        kept = columns["verdict"] == KEPT_VERDICT
        no_margin = np.isnan(columns["margin"][kept])
        if no_margin.any() and not no_margin.all():
            raise ValueError(
                f"only {(~no_margin).sum()} of {len(no_margin)} {split} pairs have a margin: expected one for every "
                "pair, or none. To ignore margins, set --data.columns.margin= (an empty name)."
            )
        held_out = columns["opening"] < self._cut_fraction if split == "train" else np.zeros_like(kept)
        is_excluded = self.exclusion.marked_rows(table.data.table, split)
        for name, selected in ((split, kept & ~held_out), ("val", kept & held_out)):
            if selected.any():
                rows = np.flatnonzero(selected)
                if name == "train":
                    self._training_rows = rows = self.order_training_rows(columns["subset"], rows)
                    self._left_out = tuple(np.flatnonzero(is_excluded[rows]).tolist())
                if not is_excluded[rows].all():
                    self.pairs_by_split[name] = PairDataset(table, rows[~is_excluded[rows]], split, self.answer_sides)

    def require_pairs(self, split: str) -> PairDataset:
        """Return the pairs of train, val or test.

        Raises:
            ValueError: The split has no pairs.
        """
        if split not in self.pairs_by_split:
            cut = split == "val" and split not in self.audits_by_split
            audit = self.audits_by_split.get("train" if cut else split)
            hint = plain_hint(audit, self.list_sources(fetch=False), self.encoder)
            raise ValueError(missing_pairs_message(split, self.path, audit) + hint)
        return self.pairs_by_split[split]

    def train_dataloader(self) -> StepLoader:
        """Return the steps of an epoch over the training pairs."""
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        self.train_loader = self._loader("train", shuffle=self.shuffle, accumulate=accumulate)
        return self.train_loader

    def val_dataloader(self) -> StepLoader | list[StepLoader]:
        """Return steps over the validation pairs in order; an empty list without a validation split."""
        return self._loader("val") if self._validates else []

    def test_dataloader(self) -> StepLoader:
        """Return steps over the test pairs in order."""
        return self._loader("test")

    def predict_dataloader(self) -> StepLoader:
        """Return steps over the test pairs in order, as for testing."""
        return self._loader("test")

    def example_texts(self, split: str, max_examples: int) -> list[dict[str, str]]:
        """Return the first examples of a split as text: the prompt, and every answer under the name of its side."""
        if split not in self.pairs_by_split:
            return []
        pairs = self.pairs_by_split[split]
        sides = ("prompt", *self.answer_sides)
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        return [
            {side: str(decode(list(ids))) for side, ids in zip(sides, (pair.prompt, *pair.answers), strict=True)}
            for pair in map(pairs.__getitem__, range(min(max_examples, len(pairs))))
        ]

    def sample_pairs(self, split: str, count: int | None) -> PairDataset:
        """Return at most so many pairs of a split, each once, spread evenly and always the same. None: all pairs."""
        pairs = self.require_pairs(split)
        if count is None:
            return pairs
        rows = np.unique(pairs.row_numbers)
        places = np.arange(min(count, len(rows))) * len(rows) // min(count, len(rows))
        return PairDataset(pairs.table, rows[places], pairs.split, pairs.answer_sides)

    def sample_loader(self, split: str, count: int) -> StepLoader:
        """Return steps over `sample_pairs` in order."""
        return self._loader(split, count=count)

    def _loader(self, name: str, shuffle: bool = False, accumulate: int = 1, count: int | None = None) -> StepLoader:
        plan = EpochPlan(
            self.batch_size,
            self.max_tokens,
            shuffle,
            self.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
            accumulate_batches=accumulate,
            keep_partial_step=name != "train" or count is not None,
            left_out=self._left_out if shuffle else (),
        )
        return StepLoader(self.sample_pairs(name, count), plan)

    def _folder(self, sources: Sequence[SourceFile]) -> Path:
        return cache_folder() / f"tokens-{store.store_sha256(sources, self.encoder, self.limit, self.skip_bad_rows)}"

"""What all data share that become tokens for one model: its tokenizer, lengths, what to do with bad rows.

Takes options, gives the encoder. Knows nothing of files or rows.
"""

import os
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

from lightning import LightningDataModule
from transformers import PreTrainedTokenizerBase

from dpo.models import Loader, end_ids
from dpo.tokens import MIN_LENGTH, Encoder, Format

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
            max_length: Most tokens of prompt + answer; `dpo.tokens.Encoder` says what is cut first.
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

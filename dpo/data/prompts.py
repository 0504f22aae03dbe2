"""`Prompts`: what policy and reference are to answer, for `predict`.

Takes files as `PreferencePairs` does, gives questions by the batch. Knows nothing of models: of a policy it sees the
tokenizer and the ids that end an answer.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import fsspec
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from dpo.data.columns import Columns, chat_messages, hh_prompt_text
from dpo.data.datamodule import QUICKSTART_NAME, TextData, cache_folder, check_option
from dpo.data.dialogue import DialoguePair, Turns
from dpo.data.formats import BadLineError, read_raw_rows
from dpo.data.sources import ListedFiles, list_data_files
from dpo.data.tokenization import MIN_LENGTH, PairEncoder
from dpo.models.generation import Sampling
from dpo.models.loading import read_end_ids

PROBE_ANSWERS = (" Yes.", " No.")  # two answers that show where the tokens of a prompt end


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt: as it is written for whoever reads the answers, and its token ids."""

    id: str
    prompt: str | list[dict[str, str]]
    tokens: list[int]


@dataclass(frozen=True)
class PromptBatch:
    """Prompts to be answered together.

    Attributes:
        asked: They.
        sampling: How.
        seed: Of the draws.
    """

    prompts: tuple[EncodedPrompt, ...]
    sampling: Sampling
    seed: int

    def to(self, device: torch.device | str, **_: object) -> "PromptBatch":
        """The same: there is nothing to move."""
        return self


class Prompts(TextData):
    """Prompts for `predict`: a column `prompt` of text or messages, or the histories of preference pairs.

    The answers of both models, with log-probabilities and rewards, are written in the run's folder in the format that
    `PreferencePairs` reads back once chosen and rejected are marked. All prompts are in memory. `batch_size` is how
    many are answered at once; they leave room for the longest answer within `max_length`.
    """

    def __init__(
        self,
        tokenizer: str = QUICKSTART_NAME,
        path: str = "",
        columns: Columns = Columns(),  # noqa: B008  # frozen
        sampling: Sampling = Sampling(),  # noqa: B008  # frozen
        **options: Any,
    ) -> None:
        """Choose what is asked.

        Args:
            tokenizer: Hub id or folder of the tokenizer, as a rule the policy's.
            path: As of `dpo.data.preferences.PreferencePairs`; files of both splits are read.
            columns: What stands where.
            sampling: How answers are drawn.
            options: See `dpo.data.datamodule.TextData`.

        Raises:
            ValueError: An option has no such value.
        """
        super().__init__(tokenizer, **options)
        check_option("path", path, bool(path), "a file, folder, pattern, address or hub id")
        room = self.max_length - sampling.max_new_tokens
        check_option(
            "max_length", self.max_length, room >= MIN_LENGTH, f"sampling.max_new_tokens + at least {MIN_LENGTH}"
        )
        self.path, self.columns, self.sampling = path, columns, sampling

    @cached_property
    def encoder(self) -> PairEncoder:
        """What makes tokens of prompts, so short that the longest answer fits behind."""
        room = self.max_length - self.sampling.max_new_tokens
        return PairEncoder(self.tokenizer, room, self.format, read_end_ids(self.tokenizer_name))

    def prepare_data(self) -> None:
        """Find the files."""
        self._listed(fetch=True)

    def predict_dataloader(self) -> "DataLoader[PromptBatch]":
        """The questions of this device.

        Raises:
            ValueError: A row cannot be read, or none can be used.
        """
        counts: Counter[str] = Counter()
        asked = [each for each in self._questions(counts) if isinstance(each, EncodedPrompt)]
        rank_zero_info(f"Prompts: {len(asked)} used" + "".join(f", {n} {name}" for name, n in counts.items()))
        check_option("path", self.path, bool(asked), "prompts, and none is left")
        batches = [
            PromptBatch(tuple(asked[first : first + self.batch_size]), self.sampling, self.seed * 1_000_003 + first)
            for first in range(0, len(asked), self.batch_size)
        ]
        if self.trainer:
            batches = batches[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is a map-style data set

    def _questions(self, counts: Counter[str]) -> Iterator[EncodedPrompt]:
        for number, history in enumerate(self._histories(), 1):
            refused = history if isinstance(history, str) else None
            encoded = refused or self.encoder.encode(DialoguePair(history, *PROBE_ANSWERS))  # type: ignore[arg-type]  # told apart
            if isinstance(encoded, str):
                counts[str(encoded)] += 1
                continue
            assert not isinstance(history, str)
            written = chat_messages(history) if self.encoder.uses_chat_template else hh_prompt_text(history)
            yield EncodedPrompt(f"prompts:{number}", written, encoded.prompt)

    def _histories(self) -> Iterator[Turns | str]:
        """Of every row, or the reason why not."""
        for _, file, _ in self._listed(fetch=False):
            with fsspec.open(file, "rb") as raw:
                for line, found in enumerate(islice(read_raw_rows(raw, file), self.limit), 1):
                    try:
                        if isinstance(found, BadLineError):
                            raise found
                        yield self.columns.parse_history(found)
                    except BadLineError as bad:
                        if not self.skip_bad_rows:
                            raise ValueError(
                                f"{file}, line {line}: {bad.fault}, {bad.detail}. "
                                "Mend or remove it, or leave such rows out with --data.on_bad_row skip."
                            ) from bad
                        yield bad.fault

    def _listed(self, fetch: bool) -> ListedFiles:
        return list_data_files(self.path, cache_folder() / "listings", fetch)

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

from dpo.columns import Columns, messages, text
from dpo.dialogue import Pair, Turns
from dpo.formats import BadLineError, fields
from dpo.listing import Listed, listed
from dpo.models import end_ids
from dpo.texts import QUICKSTART, TextData, cache_folder, check
from dpo.tokens import MIN_LENGTH, Encoder

PROBES = (" Yes.", " No.")  # two answers that show where the tokens of a prompt end


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        answers: To every prompt, from each model.
        temperature: The logits are divided by it; 0 takes the most probable token (one answer, then).
        top_p: Only the most probable tokens that together have this probability.
        max_new_tokens: Longest answer.
    """

    answers: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        """Check all.

        Raises:
            ValueError: One has no such value.
        """
        check("sampling.answers", self.answers, self.answers >= 1, "at least 1 answer")
        check("sampling.temperature", self.temperature, 0 <= self.temperature < float("inf"), "a number of 0 or more")
        drawn = self.temperature > 0 or self.answers == 1
        check("sampling.temperature", self.temperature, drawn, "more than 0, or all answers would be the same")
        check("sampling.top_p", self.top_p, 0 < self.top_p <= 1, "a probability above 0")
        check("sampling.max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1 token")


GREEDY = Sampling(answers=1, temperature=0.0)


@dataclass(frozen=True)
class Question:
    """One prompt: as it is written for whoever reads the answers, and its token ids."""

    id: str
    prompt: str | list[dict[str, str]]
    tokens: list[int]


@dataclass(frozen=True)
class Questions:
    """Prompts to be answered together.

    Attributes:
        asked: They.
        sampling: How.
        seed: Of the draws.
    """

    asked: tuple[Question, ...]
    sampling: Sampling
    seed: int

    def to(self, device: torch.device | str, **_: object) -> "Questions":
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
        tokenizer: str = QUICKSTART,
        path: str = "",
        columns: Columns = Columns(),  # noqa: B008  # frozen
        sampling: Sampling = Sampling(),  # frozen
        **options: Any,
    ) -> None:
        """Choose what is asked.

        Args:
            tokenizer: Hub id or folder of the tokenizer, as a rule the policy's.
            path: As of `dpo.data.PreferencePairs`; files of both splits are read.
            columns: What stands where.
            sampling: How answers are drawn.
            options: See `dpo.texts.TextData`.

        Raises:
            ValueError: An option has no such value.
        """
        super().__init__(tokenizer, **options)
        check("path", path, bool(path), "a file, folder, pattern, address or hub id")
        room = self.max_length - sampling.max_new_tokens
        check("max_length", self.max_length, room >= MIN_LENGTH, f"sampling.max_new_tokens + at least {MIN_LENGTH}")
        self.path, self.columns, self.sampling = path, columns, sampling

    @cached_property
    def encoder(self) -> Encoder:
        """What makes tokens of prompts, so short that the longest answer fits behind."""
        room = self.max_length - self.sampling.max_new_tokens
        return Encoder(self.tokenizer, room, self.format, end_ids(self.tokenizer_name))

    def prepare_data(self) -> None:
        """Find the files."""
        self._listed(fetch=True)

    def predict_dataloader(self) -> "DataLoader[Questions]":
        """The questions of this device.

        Raises:
            ValueError: A row cannot be read, or none can be used.
        """
        counts: Counter[str] = Counter()
        asked = [each for each in self._questions(counts) if isinstance(each, Question)]
        rank_zero_info(f"Prompts: {len(asked)} used" + "".join(f", {n} {name}" for name, n in counts.items()))
        check("path", self.path, bool(asked), "prompts, and none is left")
        batches = [
            Questions(tuple(asked[first : first + self.batch_size]), self.sampling, self.seed * 1_000_003 + first)
            for first in range(0, len(asked), self.batch_size)
        ]
        if self.trainer:
            batches = batches[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is a map-style data set

    def _questions(self, counts: Counter[str]) -> Iterator[Question]:
        for number, history in enumerate(self._histories(), 1):
            refused = history if isinstance(history, str) else None
            encoded = refused or self.encoder.encode(Pair(history, *PROBES))  # type: ignore[arg-type]  # told apart
            if isinstance(encoded, str):
                counts[str(encoded)] += 1
                continue
            assert not isinstance(history, str)
            written = messages(history) if self.encoder.chat else text(history)
            yield Question(f"prompts:{number}", written, encoded.prompt)

    def _histories(self) -> Iterator[Turns | str]:
        """Of every row, or the reason why not."""
        for _, file, _ in self._listed(fetch=False):
            with fsspec.open(file, "rb") as raw:
                for line, found in enumerate(islice(fields(raw, file), self.limit), 1):
                    try:
                        if isinstance(found, BadLineError):
                            raise found
                        yield self.columns.history(found)
                    except BadLineError as bad:
                        if not self.skip_bad:
                            raise ValueError(
                                f"{file}, line {line}: {bad.fault}, {bad.detail}. "
                                "Mend or remove it, or leave such rows out with --data.on_bad_row skip."
                            ) from bad
                        yield bad.fault

    def _listed(self, fetch: bool) -> Listed:
        return listed(self.path, cache_folder() / "listings", fetch)

"""Prompts that policy and reference answer: single ones, and the data module `Prompts` for `predict`.

`Prompts` reads the same files as `PreferencePairs`. Of the policy, only the tokenizer and the token ids that end an
answer are used.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import fsspec
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from dpo.data.columns import Columns, chat_messages
from dpo.data.datamodule import OnBadRow, TextData, cache_folder, check_option
from dpo.data.dialogue import DialoguePair, Refusal, Turns
from dpo.data.formats import BadLineError, Fault, RawRow, read_rows
from dpo.data.plain import history_parser
from dpo.data.sources import ListedFiles, list_data_files
from dpo.data.tokenization import MIN_LENGTH, EncodedPair, PairEncoder, TextFormat
from dpo.models.generation import Sampling
from dpo.secrets import reveal_address

PROBE_ANSWERS = (" Yes.", " No.")
"""Two answers with which a prompt is encoded as a pair, which shows where the tokens of the prompt end."""


@dataclass(frozen=True)
class EncodedPrompt:
    """One tokenized prompt.

    Attributes:
        id: ``prompts:line``.
        prompt: The prompt as it is written beside its answers: text in the format of hh-rlhf or as it stands, or
            messages.
        tokens: Its token ids, up to where the answer begins.
        given_as_messages: Whether the data has it as messages rather than as text.
    """

    id: str
    prompt: str | list[dict[str, str]]
    tokens: list[int]
    given_as_messages: bool = False


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that are answered together.

    Attributes:
        prompts: The prompts.
        sampling: How answers are sampled.
        seed: Seed of the samples.
    """

    prompts: tuple[EncodedPrompt, ...]
    sampling: Sampling
    seed: int

    def to(self, device: torch.device | str, **_: object) -> "PromptBatch":
        """Return the batch itself: it has no tensors to move."""
        return self


Prompt = str | Sequence[Mapping[str, str]]
"""A question as text, a dialogue in the format of hh-rlhf, or messages with ``role`` and ``content``."""


def encode_prompt(encoder: PairEncoder, prompt: Prompt) -> list[int]:
    """Return the token ids of a prompt, up to where the answer begins.

    Raises:
        ValueError: The prompt cannot be used; the message says why.
    """
    return _require_usable(_encode_pair(encoder, prompt, *PROBE_ANSWERS), prompt).prompt


def encode_answers(encoder: PairEncoder, prompt: Prompt, answers: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """Return the token ids of the prompt and of the answer, for every answer.

    Raises:
        ValueError: The prompt or an answer cannot be used; the message says why.
    """
    return [_encode_answer(encoder, prompt, encoder.answer_text(answer)) for answer in answers]


def _encode_answer(encoder: PairEncoder, prompt: Prompt, text: str) -> tuple[list[int], list[int]]:
    pair = _encode_pair(encoder, prompt, text, f"{text}.")
    if pair == "identical_after_truncation" or (isinstance(pair, EncodedPair) and pair.chosen_cut):
        raise ValueError(
            f"expected an answer that fits into {encoder.max_length} tokens, got one of {len(text):,} characters."
        )
    usable = _require_usable(pair, prompt)
    return usable.prompt, usable.chosen


def _encode_pair(encoder: PairEncoder, prompt: Prompt, chosen: str, rejected: str) -> EncodedPair | Refusal:
    if isinstance(prompt, Mapping):
        raise ValueError(
            f"expected a prompt as text or as a list of messages, got one message without a list: {prompt}"
        )
    value = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
    try:
        history = history_parser(Columns(), encoder.format)({"prompt": value})
    except BadLineError as error:
        raise ValueError(f"the prompt cannot be used ({error.detail}): {prompt!r}") from error
    return history if isinstance(history, Refusal) else encoder.encode(DialoguePair(history, chosen, rejected))


def _require_usable(pair: EncodedPair | Refusal, prompt: Prompt) -> EncodedPair:
    if isinstance(pair, Refusal):
        raise ValueError(f"the prompt cannot be used ({pair.replace('_', ' ')}): {prompt!r}")
    return pair


def _written(encoder: PairEncoder, pair: DialoguePair) -> str | list[dict[str, str]]:
    if encoder.format == "plain":
        return pair.history[-1].text
    return chat_messages(pair.history) if encoder.uses_chat_template else pair.prompt_text


class Prompts(TextData):
    """Prompts for `predict`: a column `prompt` of text or messages, or the histories of preference pairs.

    The answers of both models, with log-probabilities and rewards, are written to the run's folder in the format that
    `PreferencePairs` reads, once answers are marked as chosen and rejected. All prompts are in memory.
    """

    def __init__(
        self,
        path: str = "",
        columns: Columns = Columns(),  # noqa: B008  # frozen
        sampling: Sampling = Sampling(),  # noqa: B008  # frozen
        tokenizer: str | None = None,
        max_length: int = 512,
        batch_size: int = 8,
        limit: int | None = None,
        format: TextFormat = "auto",
        on_bad_row: OnBadRow = "error",
        seed: int = 0,
    ) -> None:
        """Choose which prompts are answered, and how.

        Args:
            path: File, folder, pattern, address or hub id, as for `PreferencePairs`; files of both splits are read.
            columns: Column name for each field.
            sampling: How answers are sampled.
            tokenizer: Hub id or folder of the tokenizer. Default: the tokenizer of the policy that the trainer runs.
            max_length: Maximum tokens of prompt + answer; prompts are cut to leave room for the longest answer.
            batch_size: Prompts that are answered together.
            limit: Maximum number of rows to read from each file, from its start. None: all.
            format: ``hh`` keeps the text of a dialogue, ``chat`` uses the tokenizer's chat template, ``plain`` takes
                text as it stands, ``auto`` is ``chat`` if there is a template and ``hh`` otherwise.
            on_bad_row: Stop at an unreadable row (``error``), or leave it out and count it (``skip``).
            seed: Seed of the samples.

        Raises:
            ValueError: An option has an invalid value.
        """
        super().__init__(tokenizer, max_length, batch_size, limit, format, on_bad_row, seed)
        check_option("path", path, bool(path), "a file, folder, pattern, address or hub id")
        check_option(
            "max_length",
            max_length,
            max_length - sampling.max_new_tokens >= MIN_LENGTH,
            f"sampling.max_new_tokens + at least {MIN_LENGTH}",
        )
        self.path = path
        self.columns = columns
        self.sampling = sampling

    def make_encoder(self, tokenizer: PreTrainedTokenizerBase, end_ids: list[int]) -> PairEncoder:
        """Create an encoder that cuts prompts so that the longest answer still fits."""
        return PairEncoder(tokenizer, self.max_length - self.sampling.max_new_tokens, self.format, end_ids)

    def prepare_data(self) -> None:
        """List the files, in one process."""
        self._list_files(fetch=True)

    def predict_dataloader(self) -> "DataLoader[PromptBatch]":
        """Return the batches of prompts of this device.

        Raises:
            ValueError: A row cannot be read, or no row can be used.
        """
        refused: Counter[str] = Counter()
        prompts = list(self._prompts(refused))
        rank_zero_info(f"Prompts: {len(prompts)} used" + "".join(f", {n} {name}" for name, n in refused.items()))
        check_option("path", self.path, bool(prompts), "files with usable prompts")
        batches = [
            PromptBatch(tuple(prompts[first : first + self.batch_size]), self.sampling, self.seed * 1_000_003 + first)
            for first in range(0, len(prompts), self.batch_size)
        ]
        if self.trainer:
            batches = batches[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is a map-style data set

    def _prompts(self, refused: Counter[str]) -> Iterator[EncodedPrompt]:
        """Yield the usable prompts and count the others by reason."""
        for line, parsed in enumerate(self._parsed_rows(), 1):
            history, given_as_messages = (parsed, False) if isinstance(parsed, Fault) else parsed
            if isinstance(history, Refusal | Fault):
                refused[history] += 1
                continue
            pair = DialoguePair(history, *PROBE_ANSWERS)
            encoded = self.encoder.encode(pair)
            if isinstance(encoded, Refusal):
                refused[encoded] += 1
                continue
            yield EncodedPrompt(f"prompts:{line}", _written(self.encoder, pair), encoded.prompt, given_as_messages)

    def _parse(self, raw_row: RawRow) -> tuple[Turns | Refusal, bool]:
        """Return the turns to be answered, and whether they are given as messages."""
        given = raw_row.get(self.columns.prompt, raw_row.get(self.columns.chosen))
        parse = history_parser(self.columns, self.encoder.format)
        return parse(raw_row), isinstance(given, list)

    def _parsed_rows(self) -> Iterator[tuple[Turns | Refusal, bool] | Fault]:
        for _, file, _ in self._list_files(fetch=False):
            with fsspec.open(reveal_address(file), "rb") as raw:
                yield from islice(read_rows(raw, file, self._parse, self.skip_bad_rows), self.limit)

    def _list_files(self, fetch: bool) -> ListedFiles:
        return list_data_files(self.path, cache_folder() / "listings", fetch)

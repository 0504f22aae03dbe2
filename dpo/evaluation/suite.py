"""Files of reward benchmarks -> rows with token ids, and by name every row that cannot be scored.

Two layouts are read, in every format of `dpo.data.formats`. RewardBench (Lambert et al. 2024, arXiv 2403.13787) has one
text as ``chosen`` and one as ``rejected``; RewardBench 2 (Malik et al. 2025, arXiv 2506.01937) has lists of texts. The
columns ``subset`` and ``id`` may be missing: then the file is one subset, and its rows are named by their number.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from dpo.data.columns import Columns, PairRow
from dpo.data.dialogue import DialoguePair, Refusal, Turns
from dpo.data.formats import DATA_FILE_SUFFIXES, BadLineError, Fault, RawRow, read_rows
from dpo.data.plain import row_parser
from dpo.data.tokenization import EncodedPair, PairEncoder
from dpo.models.batch import Example

COLUMNS = Columns(weight="", margin="")
TIES_SUBSET = "ties"  # of RewardBench 2, in lower case
_TIES_ID = re.compile(r"(ref|tied):(\w+)")
_TIES_ALONE = "ties_without_partner"
_FILE_NUMBERS = re.compile(r"-\d{5}-of-\d{5}$")
_SPLIT_NAMES = {"train", "test", "validation", "raw", "filtered"}  # not the name of a suite without that of the folder


@dataclass(frozen=True)
class SuiteRow:
    """One row of a benchmark that can be scored.

    Attributes:
        id: Name of the row.
        subset: The subset that it belongs to.
        chosen: Texts of the right answers.
        rejected: Texts of the wrong answers.
        is_pair: Whether the row has RewardBench's layout, one text on each side, and so its rule.
        example: Token ids of the prompt, which all answers share, and of the answers, the right ones first.
        cuts: What was cut to the maximum length, in words.
    """

    id: str
    subset: str
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    is_pair: bool
    example: Example
    cuts: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        """Texts of all answers, in the order of `example`."""
        return (*self.chosen, *self.rejected)

    @property
    def ties_prompt(self) -> str | None:
        """The prompt that a row of RewardBench 2's subset Ties belongs to; None for a row of another subset."""
        found = _TIES_ID.fullmatch(self.id) if self.subset.lower() == TIES_SUBSET else None
        return found.group(2) if found else None

    @property
    def is_ties_reference(self) -> bool:
        """Whether the row is the one of its prompt in Ties that has a single right answer."""
        return self.id.startswith("ref:")


@dataclass(frozen=True)
class Suite:
    """A file of a benchmark.

    Attributes:
        name: Its name, without the format.
        file_name: Its name.
        sha256: Hash of its bytes.
        rows: Rows that can be scored, in order.
        rows_read: Number of rows that were read.
        unscored: Names of the other rows, by reason.
        limit: Only so many rows were to be read; None: all.
    """

    name: str
    file_name: str
    sha256: str
    rows: tuple[SuiteRow, ...]
    rows_read: int
    unscored: dict[str, list[str]] = field(default_factory=dict)
    limit: int | None = None

    @property
    def cut_ids(self) -> dict[str, list[str]]:
        """Names of the rows of which something was cut, by what it was."""
        found = defaultdict(list)
        for row in self.rows:
            for cut in row.cuts:
                found[cut].append(row.id)
        return dict(found)


@dataclass(frozen=True)
class _TextRow:
    id: str
    subset: str
    history: Turns
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    is_pair: bool


@dataclass(frozen=True)
class _Unscored:
    id: str
    reason: str
    detail: str


def suite_name(file: Path) -> str:
    """Return the name of a file without its format and number, after that of its folder if it is named by a split."""
    suffix = next((each for each in DATA_FILE_SUFFIXES if file.name.endswith(each) and each.endswith(".gz")), "")
    name = _FILE_NUMBERS.sub("", file.name.removesuffix(suffix or file.suffix))
    return f"{file.resolve().parent.name}-{name}" if name in _SPLIT_NAMES else name


def read_suite(file: Path, whole: PairEncoder, limited: PairEncoder, limit: int | None = None) -> Suite:
    """Read a file of a benchmark.

    Args:
        file: The file; its suffix says the format.
        whole: Tokenizes without a maximum length.
        limited: Tokenizes with the maximum length; used for rows that are longer.
        limit: Read only so many rows, from the start.

    Raises:
        ValueError: The file cannot be read, or no row can be scored.
    """
    if not file.name.endswith(DATA_FILE_SUFFIXES):
        raise ValueError(f"--suite {file}: expected a file that ends in {', '.join(DATA_FILE_SUFFIXES)}.")
    parsed = list(_parse_rows(file, suite_name(file), row_parser(COLUMNS, whole.format), limit))
    rows = [_encode_row(row, whole, limited) if isinstance(row, _TextRow) else row for row in parsed]
    rows = list(_without_single_ties(rows))
    unscored: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if isinstance(row, _Unscored):
            unscored[row.reason].append(row.id)
    used = tuple(row for row in rows if isinstance(row, SuiteRow))
    if not used:
        first = next(row for row in rows if isinstance(row, _Unscored))
        raise ValueError(
            f"--suite {file}: expected rows with prompt, chosen and rejected, got none that can be scored; row "
            f"{first.id}: {first.detail}."
        )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Suite(suite_name(file), file.name, digest, used, len(rows), dict(unscored), limit)


def _parse_rows(
    file: Path, subset: str, parse: Callable[[RawRow], PairRow], limit: int | None
) -> Iterator[_TextRow | _Unscored]:
    with file.open("rb") as raw:
        rows = read_rows(raw, str(file), dict, skip_bad=True)
        for number, row in enumerate(islice(rows, limit), 1):
            if isinstance(row, Fault):
                yield _Unscored(f"line {number}", row.value, row.replace("_", " "))
                continue
            name = str(row.get("id", number))
            try:
                yield _parse_row(row, name, str(row.get("subset") or subset), parse)
            except BadLineError as error:
                yield _Unscored(name, error.fault.value, error.detail)


def _parse_row(raw: RawRow, name: str, subset: str, parse: Callable[[RawRow], PairRow]) -> _TextRow | _Unscored:
    """Read every answer of a row as half of a pair, which is how training reads answers."""
    COLUMNS.require(raw, COLUMNS.chosen, COLUMNS.rejected)
    (chosen, one_chosen), (rejected, one_rejected) = (_answers(raw, side) for side in ("chosen", "rejected"))

    def pair(side: Any, other: Any) -> DialoguePair | Refusal:
        return parse({**raw, "chosen": side, "rejected": other}).pair

    left = [pair(each, rejected[0]) for each in chosen]
    right = [pair(chosen[0], each) for each in rejected[1:]]
    pairs = [each for each in (*left, *right) if isinstance(each, DialoguePair)]
    if len(pairs) < len(left) + len(right):
        return _refused(name, next(each for each in (*left, *right) if isinstance(each, Refusal)))
    if any(each.history != pairs[0].history for each in pairs):
        return _refused(name, Refusal.HISTORIES_DIFFER)
    texts = tuple(each.chosen for each in pairs[: len(left)])
    wrong = (pairs[0].rejected, *(each.rejected for each in pairs[len(left) :]))
    return _TextRow(name, subset, pairs[0].history, texts, wrong, one_chosen and one_rejected)


def _answers(raw: RawRow, side: str) -> tuple[list[Any], bool]:
    """Return the answers in a column, and whether it has one instead of a list of them."""
    value = raw[side]
    if isinstance(value, list) and not any(isinstance(each, dict) for each in value):
        if not value:
            raise BadLineError(Fault.WRONG_TYPE, f"column {side!r}: expected at least one answer, got none")
        return value, False
    return [value], True


def _refused(name: str, reason: Refusal) -> _Unscored:
    return _Unscored(name, reason.value, reason.replace("_", " "))


def _encode_row(row: _TextRow, whole: PairEncoder, limited: PairEncoder) -> SuiteRow | _Unscored:
    """Tokenize a row, cut to the maximum length as a pair of its longest and each other answer would be."""
    texts = list(dict.fromkeys((*row.chosen, *row.rejected)))
    pairs = _encode_beside(whole, row.history, texts[0], texts[1:])
    if isinstance(pairs, Refusal):
        return _refused(row.id, pairs)
    lengths = [len(pairs[0].prompt + pairs[0].chosen), *(len(pair.prompt + pair.rejected) for pair in pairs)]
    if max(lengths) > limited.max_length:
        longest = texts.pop(lengths.index(max(lengths)))
        texts.insert(0, longest)
        pairs = _encode_beside(limited, row.history, longest, texts[1:])
        if isinstance(pairs, Refusal):
            return _refused(row.id, pairs)
    prompt = min((pair.prompt for pair in pairs), key=len)
    tokens = [pairs[0].prompt[len(prompt) :] + pairs[0].chosen]
    tokens += [pair.prompt[len(prompt) :] + pair.rejected for pair in pairs]
    tokens_by_text = dict(zip(texts, tokens, strict=True))
    answers = tuple(tokens_by_text[text] for text in (*row.chosen, *row.rejected))
    example = Example(row.id, prompt, answers)
    return SuiteRow(row.id, row.subset, row.chosen, row.rejected, row.is_pair, example, tuple(_cuts(pairs)))


def _encode_beside(
    encoder: PairEncoder, history: Turns, text: str, others: Sequence[str]
) -> list[EncodedPair] | Refusal:
    """Tokenize pairs of one answer with each of the others, or return why one of them cannot be used."""
    encoded = encoder.encode_batch([DialoguePair(history, text, other) for other in others])
    refusal = next((each for each in encoded if isinstance(each, Refusal)), None)
    return refusal or [each for each in encoded if isinstance(each, EncodedPair)]


def _cuts(pairs: Sequence[EncodedPair]) -> Iterator[str]:
    if pairs[0].turns_dropped:
        yield "oldest turns of the prompt left out"
    if pairs[0].prompt_cut:
        yield "start of the prompt cut"
    if any(pair.chosen_cut or pair.rejected_cut for pair in pairs):
        yield "end of an answer cut"


def _without_single_ties(rows: Sequence[SuiteRow | _Unscored]) -> Iterator[SuiteRow | _Unscored]:
    """Replace rows of Ties that cannot be scored as published: that takes both rows of a prompt."""
    ties = [row for row in rows if isinstance(row, SuiteRow) and row.subset.lower() == TIES_SUBSET]
    usable = {(row.ties_prompt, row.is_ties_reference) for row in ties if row.is_ties_reference or len(row.chosen) > 1}
    whole = Counter(prompt for prompt, _ in usable if prompt is not None)
    for row in rows:
        alone = isinstance(row, SuiteRow) and row.subset.lower() == TIES_SUBSET and whole[row.ties_prompt or ""] < 2
        detail = "expected rows ref:N and tied:N of the same prompt, tied:N with several right answers"
        yield _Unscored(row.id, _TIES_ALONE, detail) if alone else row

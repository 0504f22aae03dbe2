"""A folder or hub id -> files -> rows, each row either its two dialogues or what is wrong with it.

Takes the layout of Anthropic/hh-rlhf: ``<subset>/{train,test}.jsonl.gz`` (or ``.jsonl``), one JSON object a
line with the strings ``chosen`` and ``rejected``. Knows nothing of turns, tokens or what to do with bad rows.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

SPLITS = ("train", "test")
_ENDINGS = (".jsonl.gz", ".jsonl")


class Fault(StrEnum):
    """Why a line cannot be read as a row.

    Attributes:
        INVALID_UTF8: Its bytes, or an escape in a string, are not text.
        CUT_LINE: The last line, broken and without a line end: the file was cut.
        BROKEN_JSON: Not a JSON value.
        REPEATED_KEY: A JSON object names a key twice, so one of two values would be lost.
        MISSING_FIELD: No ``chosen`` or no ``rejected``.
        WRONG_TYPE: Not an object, or a field that is not a string.
    """

    INVALID_UTF8 = "invalid_utf8"
    CUT_LINE = "cut_line"
    BROKEN_JSON = "broken_json"
    REPEATED_KEY = "repeated_key"
    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"


@dataclass(frozen=True)
class Row:
    """A readable line; `line` counts from 1."""

    line: int
    chosen: str
    rejected: str


@dataclass(frozen=True)
class BadRow:
    """An unreadable line; `detail` says in words what is wrong."""

    line: int
    fault: Fault
    detail: str


@dataclass(frozen=True)
class Source:
    """One file of a data set."""

    subset: str
    split: str
    file: Path

    def sha256(self) -> str:
        """Hash of the file's bytes."""
        with self.file.open("rb") as raw:
            return hashlib.file_digest(raw, "sha256").hexdigest()


class _BadLineError(Exception):
    def __init__(self, fault: Fault, detail: str) -> None:
        super().__init__(fault, detail)
        self.fault, self.detail = fault, detail


def read(raw: BinaryIO, file: Path, limit: int | None = None) -> Iterator[Row | BadRow]:
    """Read the lines of an open file one after the other, at most `limit`; `file` is its name.

    Raises:
        ValueError: The file is empty, or its compression is broken (what is lost then cannot be counted).
    """
    lines = gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw
    number = 0
    try:
        for number, line in enumerate(islice(lines, limit), 1):
            yield _row(number, line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file}, after line {number}: broken gzip ({error}). Fetch the file again.") from error
    if not number:
        raise ValueError(f"{file}, line 1: the file is empty, expected JSON rows. Fetch it again or remove it.")


def _row(number: int, line: bytes) -> Row | BadRow:
    try:
        chosen, rejected = _fields(line)
    except _BadLineError as bad:
        return BadRow(number, bad.fault, bad.detail)
    return Row(number, chosen, rejected)


def _fields(line: bytes) -> tuple[str, str]:
    row = _json(line)
    if not isinstance(row, dict):
        raise _BadLineError(Fault.WRONG_TYPE, f"expected a JSON object, got {type(row).__name__}")
    for name in ("chosen", "rejected"):
        if name not in row:
            raise _BadLineError(Fault.MISSING_FIELD, f"no field {name!r} among {sorted(row)}")
        if not isinstance(row[name], str):
            got = json.dumps(row[name])[:40]
            raise _BadLineError(Fault.WRONG_TYPE, f"field {name!r}: expected a string, got {got}")
    chosen, rejected = row["chosen"], row["rejected"]
    try:
        (chosen + rejected).encode()
    except UnicodeEncodeError as error:  # JSON may spell half a surrogate pair, which is no character
        raise _BadLineError(Fault.INVALID_UTF8, str(error)) from error
    return chosen, rejected


def _json(line: bytes) -> object:
    try:
        return json.loads(line.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise _BadLineError(Fault.INVALID_UTF8, str(error)) from error
    except (ValueError, RecursionError) as error:
        fault = Fault.BROKEN_JSON if line.endswith(b"\n") else Fault.CUT_LINE
        raise _BadLineError(fault, f"no JSON ({error})") from error


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        raise _BadLineError(Fault.REPEATED_KEY, f"a key stands twice among {sorted(key for key, _ in items)}")
    return found


def find(folder: Path, subsets: Sequence[str] | None) -> list[Source]:
    """The files of a folder, subset by subset, train before test (which a subset need not have).

    Raises:
        ValueError: A subset is not there, or one of its files is there twice.
    """
    there = sorted({file.parent.name for ending in _ENDINGS for file in folder.glob(f"*/train{ending}")})
    wanted = there if subsets is None else subsets
    unknown = [subset for subset in wanted if subset not in there]
    if unknown or not there:
        raise ValueError(
            f"{folder}: expected <subset>/train.jsonl.gz, found {', '.join(there) or 'none'}"
            + (f", not {', '.join(unknown)}: choose --data.subsets among those found." if there else ".")
        )
    names = [(subset, split) for subset in wanted for split in SPLITS]
    return [Source(*name, file) for name in names for file in _files(folder.joinpath(*name))]


def _files(stem: Path) -> list[Path]:
    found = [file for ending in _ENDINGS if (file := stem.with_name(stem.name + ending)).is_file()]
    if len(found) > 1:
        raise ValueError(f"{found[0]} and {found[1].name} are both there: remove one of them.")
    return found


def download(repository: str, subsets: Sequence[str] | None, local_only: bool = False) -> Path:
    """Fetch a data set's files from the Hugging Face hub into its own cache, or find them there.

    Raises:
        ValueError: No such folder here, and none on the hub, or it cannot be reached.
    """
    patterns = [f"{subset}/{split}.jsonl*" for subset in subsets or ["*"] for split in SPLITS]
    fetch = partial(snapshot_download, repository, repo_type="dataset", local_files_only=local_only)
    try:
        folder = Path(fetch(allow_patterns=patterns))
        if any(not folder.joinpath(subset).is_dir() for subset in subsets or []):
            fetch(allow_patterns=["*/train.jsonl*"])  # what is there, then?
    except (OSError, HFValidationError) as error:
        raise ValueError(
            f"{repository!r} is no folder here, and the hub does not give it: {error}\n"
            "Check --data.path; without a network, give a folder that has <subset>/train.jsonl.gz."
        ) from error
    return folder

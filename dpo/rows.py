"""Sources -> rows, each either its pair or what is wrong with it; the layout of Anthropic/hh-rlhf -> sources.

Takes files, here or behind any address that fsspec reads, and ``<subset>/{train,test}.jsonl.gz`` (or ``.jsonl``) of a
folder or a hub id. Knows nothing of tokens or what to do with bad rows.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from dpo.columns import Columns, Row
from dpo.formats import BadLineError, Fault, Fields, fields

SPLITS = ("train", "test")
HH = Columns(prompt="", system="", weight="", margin="")
"""Two whole dialogues and nothing else."""
_ENDINGS = (".jsonl.gz", ".jsonl")


@dataclass(frozen=True)
class BadRow:
    """An unreadable line; `detail` says in words what is wrong."""

    line: int
    fault: Fault
    detail: str


@dataclass(frozen=True)
class Source:
    """One file of a data set.

    Attributes:
        subset: To which part it belongs.
        split: One of `SPLITS`.
        file: Its path, or an address of a file elsewhere.
        columns: What stands where in it.
        version: What tells its content from any other; the hash of its bytes where there is none.
    """

    subset: str
    split: str
    file: str
    columns: Columns = HH
    version: str = ""

    def identity(self) -> str:
        """What tells its content from any other."""
        if self.version:
            return self.version
        with open(self.file, "rb") as raw:
            return hashlib.file_digest(raw, "sha256").hexdigest()


def read(raw: BinaryIO, file: str | Path, columns: Columns = HH, limit: int | None = None) -> Iterator[Row | BadRow]:
    """Read the rows of an open file one after the other, at most `limit`; `file` is its name.

    Raises:
        ValueError: The file is empty or broken as a whole.
    """
    for number, found in enumerate(islice(fields(raw, str(file)), limit), 1):
        yield _row(columns, number, found)


def _row(columns: Columns, number: int, found: Fields | BadLineError) -> Row | BadRow:
    try:
        if isinstance(found, BadLineError):
            raise found
        return columns.row(number, found)
    except BadLineError as bad:
        return BadRow(number, bad.fault, bad.detail)


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
    return [Source(*name, str(file)) for name in names for file in _files(folder.joinpath(*name))]


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

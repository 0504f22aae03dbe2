"""A path, pattern, address or hub id -> the files of a data set, each with its split and what tells its content.

Takes ``rows.jsonl``, ``folder``, ``folder/*.parquet``, ``s3://bucket/folder`` (anything that fsspec reads),
``owner/name`` of a data set on the Hugging Face hub or ``owner/name/data/train-*.parquet`` in one. Nothing is copied
here: files elsewhere are read where they are. What was found elsewhere is noted, so that tokens made of it are found
again without a network.

Sources -> rows, each either its pair or what is wrong with it: from files, here or behind any address that fsspec
reads, and ``<subset>/{train,test}.jsonl.gz`` (or ``.jsonl``) of a folder or a hub id, the layout of Anthropic/hh-rlhf.
Knows nothing of tokens or what to do with bad rows.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from glob import glob
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import fsspec
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError

from dpo.data.columns import Columns, PairRow
from dpo.data.formats import DATA_FILE_SUFFIXES, BadLineError, Fault, RawRow, read_raw_rows
from dpo.files import write_atomically

SPLITS = ("train", "test")
HH_COLUMNS = Columns(prompt="", system="", weight="", margin="")
"""Two whole dialogues and nothing else."""
_ENDINGS = (".jsonl.gz", ".jsonl")


@dataclass(frozen=True)
class BadRow:
    """An unreadable line; `detail` says in words what is wrong."""

    line: int
    fault: Fault
    detail: str


@dataclass(frozen=True)
class SourceFile:
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
    columns: Columns = HH_COLUMNS
    version: str = ""

    def content_id(self) -> str:
        """What tells its content from any other."""
        if self.version:
            return self.version
        with open(self.file, "rb") as raw:
            return hashlib.file_digest(raw, "sha256").hexdigest()


def read_pair_rows(
    raw: BinaryIO, file_name: str | Path, columns: Columns = HH_COLUMNS, limit: int | None = None
) -> Iterator[PairRow | BadRow]:
    """Read the rows of an open file one after the other, at most `limit`; `file` is its name.

    Raises:
        ValueError: The file is empty or broken as a whole.
    """
    for number, found in enumerate(islice(read_raw_rows(raw, str(file_name)), limit), 1):
        yield _row(columns, number, found)


def _row(columns: Columns, number: int, found: RawRow | BadLineError) -> PairRow | BadRow:
    try:
        if isinstance(found, BadLineError):
            raise found
        return columns.parse_row(number, found)
    except BadLineError as bad:
        return BadRow(number, bad.fault, bad.detail)


def find_hh_files(folder: Path, subsets: Sequence[str] | None) -> list[SourceFile]:
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
    return [SourceFile(*name, str(file)) for name in names for file in _of_split(folder.joinpath(*name))]


def _of_split(stem: Path) -> list[Path]:
    found = [file for ending in _ENDINGS if (file := stem.with_name(stem.name + ending)).is_file()]
    if len(found) > 1:
        raise ValueError(f"{found[0]} and {found[1].name} are both there: remove one of them.")
    return found


def download_dataset(repository: str, subsets: Sequence[str] | None, local_only: bool = False) -> Path:
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


_HELD_OUT = {"test", "validation", "valid", "val", "dev", "eval"}
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_PATTERN = re.compile(r"[*?\[]")

ListedFiles = list[tuple[str, str, str]]  # split, file, version


def list_data_files(path: str, notes_folder: Path, fetch: bool) -> ListedFiles:
    """The files behind a path, train before test.

    A file whose name or folder below the path has the word test, validation, valid, val, dev or eval is of the test
    split; every other one is of train.

    Args:
        path: See above.
        notes: Folder for what was found elsewhere.
        fetch: Look again; otherwise believe the notes.

    Raises:
        ValueError: There is no such file.
    """
    here = Path(path).expanduser()
    if "://" not in path and (here.exists() or glob(str(here), recursive=True)):
        return _files(str(here.absolute()))
    note = notes_folder / f"{hashlib.sha256(path.encode()).hexdigest()}.json"
    if fetch:
        try:
            found = _files(path if "://" in path else _on_hub(path))
        except (OSError, HFValidationError) as error:
            if not note.is_file():
                raise ValueError(
                    f"--data.path: no file, folder or pattern {path!r} is here, and it cannot be read elsewhere: "
                    f"{error}\nGive a path, an address (s3://...) or a data set of the hub (owner/name)."
                ) from error
        else:
            notes_folder.mkdir(parents=True, exist_ok=True)
            with write_atomically(note) as temporary:
                temporary.write_text(json.dumps(found))
    return [(split, file, version) for split, file, version in json.loads(note.read_text())]


def make_sources(subset: str, files: ListedFiles, columns: Columns) -> list[SourceFile]:
    """The files as parts of a data set."""
    return [SourceFile(subset, split, file, columns, version) for split, file, version in files]


def _on_hub(path: str) -> str:
    """The address of a data set at its present revision, or of files in it."""
    owner, name, *rest = path.split("/") if path.count("/") else (path, "")
    if not name or path.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"{path!r} is not the id of a data set either")
    revision = HfApi().dataset_info(f"{owner}/{name}").sha
    return "/".join([f"hf://datasets/{owner}/{name}@{revision}", *rest])


def _files(address: str) -> ListedFiles:
    files, root = fsspec.url_to_fs(address)
    if files.isdir(root):
        names, base = files.find(root), root
    else:
        names = [root] if files.isfile(root) else files.glob(root)
        base = _PATTERN.split(root)[0].rpartition("/")[0]
    kept = sorted(name for name in names if _is_data(name))
    if not kept:
        raise ValueError(
            f"{address}: expected files that end in {', '.join(DATA_FILE_SUFFIXES)}, found "
            f"{', '.join(sorted(PurePosixPath(name).name for name in names)[:5]) or 'none'}."
        )
    local = "file" in _as_tuple(files.protocol)
    rows = [(_split(name.removeprefix(base)), *_named(files, name, local)) for name in kept]
    return sorted(rows, key=lambda row: row[0] == "test")


def _named(files: Any, name: str, local: bool) -> tuple[str, str]:
    """The address of a file, and its version where reading it only to tell would cost."""
    if local:
        return name, ""
    address = files.unstrip_protocol(name)
    return address, f"{address} {files.ukey(name)}"


def _is_data(name: str) -> bool:
    return name.endswith(DATA_FILE_SUFFIXES) and PurePosixPath(name).name not in _DESCRIPTIONS


def _split(name: str) -> str:
    return "test" if _HELD_OUT & set(re.split(r"[^a-z]+", name.lower())) else "train"


def _as_tuple(protocol: str | Iterable[str]) -> tuple[str, ...]:
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)

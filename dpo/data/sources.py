"""The files of a data set, each with its split and a value that changes with its content.

A data set is a file, a folder, a pattern such as ``folder/*.parquet``, an address that fsspec reads such as
``s3://bucket/folder``, a Hugging Face hub id ``owner/name``, or files of one, ``owner/name/data/train-*.parquet``.
Remote files are read where they are, not copied; their listing is saved, so that their tokens are found again without a
network. `find_hh_files` reads the layout of Anthropic/hh-rlhf: ``<subset>/{train,test}.jsonl.gz`` (or ``.jsonl``).
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path, PurePosixPath

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError

from dpo.data.columns import Columns
from dpo.data.formats import DATA_FILE_SUFFIXES
from dpo.files import write_atomically
from dpo.models.hub_errors import UNREADABLE_FROM_HUB, hub_error_line
from dpo.secrets import conceal, hide_address, reveal_address

SPLITS = ("train", "val", "test")
HH_SPLITS = ("train", "test")
HH_COLUMNS = Columns(prompt="", system="", weight="", margin="")
"""Two whole dialogues and no other field."""
_HH_SUFFIXES = (".jsonl.gz", ".jsonl")
_VALIDATION = {"validation", "valid", "val", "dev", "eval"}
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_WILDCARD = re.compile(r"[*?\[]")
_NAME_IT = "For pairs in files of any other layout, name their class: --data PreferencePairs."

ListedFiles = list[tuple[str, str, str]]  # (split, file, version) of each


@dataclass(frozen=True)
class SourceFile:
    """One file of a data set.

    Attributes:
        subset: The subset that it belongs to.
        split: One of `SPLITS`.
        file: Its path, or the address of a remote file.
        columns: Its column names.
        version: A value that changes with the content; empty for a local file, which is hashed instead.
    """

    subset: str
    split: str
    file: str
    columns: Columns = HH_COLUMNS
    version: str = ""

    def content_id(self) -> str:
        """Return the version, or the SHA-256 of the bytes of a file without one."""
        if self.version:
            return self.version
        with open(self.file, "rb") as raw:
            return hashlib.file_digest(raw, "sha256").hexdigest()


def splits_of(sources: Sequence[SourceFile]) -> list[str]:
    """Return the splits that the files belong to, train first."""
    return [split for split in SPLITS if any(source.split == split for source in sources)]


def why_no_hh_layout(path: str) -> str:
    """Say why a path is for `PreferencePairs` and not for `HHRLHF`; empty if it may be for `HHRLHF`."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        has_layout = any(any(folder.glob(f"*/train{suffix}")) for suffix in _HH_SUFFIXES)
        files = (file for file in folder.rglob("*") if file.name.endswith(DATA_FILE_SUFFIXES))
        return "" if has_layout or not any(files) else "a folder without <subset>/train.jsonl.gz"
    if "://" in path:
        return "an address"
    if _WILDCARD.search(path):
        return "a pattern"
    return "a file" if folder.is_file() or path.endswith(DATA_FILE_SUFFIXES) else ""


def find_hh_files(folder: Path, subsets: Sequence[str] | None) -> list[SourceFile]:
    """List the files of a folder in the layout of hh-rlhf: subset by subset, train before test.

    Args:
        folder: Folder with one sub-folder per subset, each with a train file and possibly a test file.
        subsets: Subsets to read, in this order. None: all, sorted by name.

    Raises:
        ValueError: A subset is missing, or has the same split twice.
    """
    existing = sorted({file.parent.name for suffix in _HH_SUFFIXES for file in folder.glob(f"*/train{suffix}")})
    wanted = existing if subsets is None else subsets
    unknown = [subset for subset in wanted if subset not in existing]
    if unknown or not existing:
        raise ValueError(
            f"{folder}: expected <subset>/train.jsonl.gz, found {', '.join(existing) or 'none'}"
            + (f", not {', '.join(unknown)}: choose --data.subsets among those found." if existing else f". {_NAME_IT}")
        )
    names = [(subset, split) for subset in wanted for split in HH_SPLITS]
    return [SourceFile(*name, str(file)) for name in names for file in _hh_files(folder.joinpath(*name))]


def _hh_files(stem: Path) -> list[Path]:
    files = [file for suffix in _HH_SUFFIXES if (file := stem.with_name(stem.name + suffix)).is_file()]
    if len(files) > 1:
        raise ValueError(f"{files[0]} and {files[1].name} both exist: remove one of them.")
    return files


def download_dataset(repository: str, subsets: Sequence[str] | None, local_only: bool = False) -> Path:
    """Download a data set in the layout of hh-rlhf from the Hugging Face hub and return its folder in the hub's cache.

    Args:
        repository: Hub id of the data set.
        subsets: Subsets to download. None: all.
        local_only: Use what is in the cache already, without a network.

    Raises:
        ValueError: The data set is neither on the hub nor in the cache, or the hub cannot be reached.
    """
    patterns = [f"{subset}/{split}.jsonl*" for subset in subsets or ["*"] for split in HH_SPLITS]
    download = partial(snapshot_download, repository, repo_type="dataset", local_files_only=local_only)
    try:
        folder = Path(download(allow_patterns=patterns))
        if any(not folder.joinpath(subset).is_dir() for subset in subsets or []):
            download(allow_patterns=["*/train.jsonl*"])  # so that the error can name the subsets that exist
    except (*UNREADABLE_FROM_HUB, HFValidationError) as error:
        raise ValueError(
            f"{repository!r} is not a folder on this machine and cannot be read from the hub: {hub_error_line(error)} "
            f"Check --data.path; without a network, give a folder with <subset>/train.jsonl.gz. {_NAME_IT}"
        ) from error
    return folder


def list_data_files(path: str, notes_folder: Path, fetch: bool) -> ListedFiles:
    """List the data files behind a path, train before val before test.

    A file belongs to the test split if its name, or a folder name below the path, contains the word test, and to val if
    it contains validation, valid, val, dev or eval; every other file belongs to train.

    Args:
        path: File, folder, pattern, address or hub id; see the module's description.
        notes_folder: Folder in which listings of remote files are saved.
        fetch: List remote files again if they can be reached; otherwise use the saved listing.

    Raises:
        ValueError: There are no such files.
    """
    local = Path(path).expanduser()
    if "://" not in path and (local.exists() or glob(str(local), recursive=True)):
        return _list_files(str(local.absolute()))
    note = notes_folder / f"{hashlib.sha256(path.encode()).hexdigest()}.json"
    if fetch:
        try:
            listed = _list_files(path if "://" in path else _hub_address(path))
        except (*UNREADABLE_FROM_HUB, HFValidationError) as error:
            if not note.is_file():
                raise ValueError(
                    f"--data.path: no local file, folder or pattern {path!r}, and it cannot be read remotely: "
                    f"{conceal(hub_error_line(error))} Give a path, an address (s3://...) or the hub id of a data set "
                    "(owner/name)."
                ) from error
        else:
            notes_folder.mkdir(parents=True, exist_ok=True)
            with write_atomically(note) as temporary:
                temporary.write_text(json.dumps(listed))
    return [(split, file, version) for split, file, version in json.loads(note.read_text())]


def _hub_address(path: str) -> str:
    """Return the address of a hub data set at its present revision, or of files in it."""
    owner, name, *rest = path.split("/") if path.count("/") else (path, "")
    if not name or path.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"{path!r} is not the hub id of a data set either")
    revision = HfApi().dataset_info(f"{owner}/{name}").sha
    return "/".join([f"hf://datasets/{owner}/{name}@{revision}", *rest])


def _list_files(address: str) -> ListedFiles:
    files, root = fsspec.url_to_fs(reveal_address(address))
    if files.isdir(root):
        names = files.find(root)
        base = root
    else:
        names = [root] if files.isfile(root) else files.glob(root)
        base = _WILDCARD.split(root)[0].rpartition("/")[0]
    data_files = sorted(
        name for name in names if name.endswith(DATA_FILE_SUFFIXES) and PurePosixPath(name).name not in _DESCRIPTIONS
    )
    if not data_files:
        raise ValueError(
            f"--data.path {address}: expected files that end in {', '.join(DATA_FILE_SUFFIXES)}, found "
            f"{', '.join(sorted(PurePosixPath(name).name for name in names)[:5]) or 'none'}."
        )
    listed = [(_split_of(name.removeprefix(base)), *_locate(files, name)) for name in data_files]
    return sorted(listed, key=lambda entry: SPLITS.index(entry[0]))


def _locate(files: AbstractFileSystem, name: str) -> tuple[str, str]:
    """Return the address and the version of a file."""
    if isinstance(files, LocalFileSystem):
        return name, ""  # hashed when needed, see `SourceFile.content_id`
    address = hide_address(files.unstrip_protocol(name))
    return address, f"{address} {files.ukey(hide_address(name))}"  # a key that a password does not change


def _split_of(name: str) -> str:
    words = set(re.split(r"[^a-z]+", name.lower()))
    return "test" if "test" in words else "val" if _VALIDATION & words else "train"

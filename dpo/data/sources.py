"""A path, pattern, address or hub id -> the files of a data set, each with its split and what tells its content.

Takes ``rows.jsonl``, ``folder``, ``folder/*.parquet``, ``s3://bucket/folder`` (anything that fsspec reads),
``owner/name`` of a data set on the Hugging Face hub or ``owner/name/data/train-*.parquet`` in one. Nothing is copied
here: files elsewhere are read where they are. What was found elsewhere is noted, so that tokens made of it are found
again without a network. Knows nothing of rows.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from glob import glob
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError

from dpo.columns import Columns
from dpo.formats import ENDINGS
from dpo.rows import Source
from dpo.run import complete

_HELD_OUT = {"test", "validation", "valid", "val", "dev", "eval"}
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_PATTERN = re.compile(r"[*?\[]")

Listed = list[tuple[str, str, str]]  # split, file, version


def listed(path: str, notes: Path, fetch: bool) -> Listed:
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
    note = notes / f"{hashlib.sha256(path.encode()).hexdigest()}.json"
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
            notes.mkdir(parents=True, exist_ok=True)
            with complete(note) as temporary:
                temporary.write_text(json.dumps(found))
    return [(split, file, version) for split, file, version in json.loads(note.read_text())]


def sources(name: str, found: Listed, columns: Columns) -> list[Source]:
    """The files as parts of a data set."""
    return [Source(name, split, file, columns, version) for split, file, version in found]


def _on_hub(path: str) -> str:
    """The address of a data set at its present revision, or of files in it."""
    owner, name, *rest = path.split("/") if path.count("/") else (path, "")
    if not name or path.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"{path!r} is not the id of a data set either")
    revision = HfApi().dataset_info(f"{owner}/{name}").sha
    return "/".join([f"hf://datasets/{owner}/{name}@{revision}", *rest])


def _files(address: str) -> Listed:
    files, root = fsspec.url_to_fs(address)
    if files.isdir(root):
        names, base = files.find(root), root
    else:
        names = [root] if files.isfile(root) else files.glob(root)
        base = _PATTERN.split(root)[0].rpartition("/")[0]
    kept = sorted(name for name in names if _is_data(name))
    if not kept:
        raise ValueError(
            f"{address}: expected files that end in {', '.join(ENDINGS)}, found "
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
    return name.endswith(ENDINGS) and PurePosixPath(name).name not in _DESCRIPTIONS


def _split(name: str) -> str:
    return "test" if _HELD_OUT & set(re.split(r"[^a-z]+", name.lower())) else "train"


def _as_tuple(protocol: str | Iterable[str]) -> tuple[str, ...]:
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)

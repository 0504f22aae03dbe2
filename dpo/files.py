"""Files that are either complete or absent, and files of JSON lines.

Takes paths and rows. Knows nothing of what is in them.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Write a file or folder aside; it takes its name, flushed to disk, only when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # of this process, others may write the same
    remove(temporary)
    try:
        yield temporary
        for file in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
            _sync(file)
        if path.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a file, one JSON object a line."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def drop_rows_from_step(path: Path, step: int) -> None:
    """Leave out the rows of a file of such rows that are of this step or a later one: they are written again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        with write_atomically(path) as temporary:
            temporary.write_text("".join(line for line in lines if json.loads(line)["step"] < step), encoding="utf-8")

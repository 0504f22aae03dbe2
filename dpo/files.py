"""Files that are complete or absent, and JSON Lines files with a step in every row."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder that replaces `path` only if the block succeeds.

    The content is flushed to disk before it is renamed. If the block fails, `path` stays as it was.
    """
    # The process id keeps processes apart that write the same path.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    remove(temporary)
    try:
        yield temporary
        for file in [temporary, *temporary.rglob("*")]:
            _sync(file)
        if path.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Remove a file or folder if it exists."""
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
    """Append rows to a JSON Lines file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def drop_rows_from_step(path: Path, step: int) -> None:
    """Remove the rows of a JSON Lines file whose ``step`` is this one or later; do nothing if there is no file."""
    if path.exists():
        # Lines of the file, not str.splitlines(): text in a row may contain other line separators, such as U+2028.
        with write_atomically(path) as temporary, path.open(encoding="utf-8") as lines:
            temporary.write_text("".join(line for line in lines if json.loads(line)["step"] < step), encoding="utf-8")

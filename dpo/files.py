"""Files that are complete or absent, and JSON Lines files with a step in every row."""

import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock
from pathlib import Path
from typing import Any

_OTHER_FOLDER = "choose another folder with --trainer.default_root_dir (runs) or DPO_CACHE (tokens, references)"
_FREE_SPACE = f"Free some space, or {_OTHER_FOLDER}"
_RIGHTS = f"Change its permissions, or {_OTHER_FOLDER}"
_OPEN_FILES = "Raise the limit of open files with `ulimit -n`"
_CURES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EFBIG: "Raise the limit of the size of a file with `ulimit -f`",
    errno.EROFS: _RIGHTS,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EMFILE: _OPEN_FILES,
    errno.ENFILE: _OPEN_FILES,
    errno.EIO: f"Check the disk or the network it is reached by, or {_OTHER_FOLDER}",
}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder that replaces `path` only if the block succeeds.

    The content is flushed to disk before it is renamed. If the block fails, `path` stays as it was. Whoever reads a
    folder while it is replaced, or after a kill at any moment, finds the old or the new one. (Where the system cannot
    exchange two folders in one step, a kill may leave the old one set aside until `restore_replaced`.)

    Raises:
        OSError: A file cannot be written; the message names it.
    """
    # The process id keeps processes apart that write the same path.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    remove(temporary)
    try:
        with explained_errors(path):
            yield temporary
            for file in [temporary, *temporary.rglob("*")]:
                _sync(file)
            if not path.is_dir():
                temporary.replace(path)
            elif not _exchange(temporary, path):
                _replace_in_two_steps(temporary, path)
            _sync(path.parent)
    finally:
        remove(temporary)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; return False if the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    names = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second))
    return renameat2 is not None and renameat2(*names, _RENAME_EXCHANGE) == 0


def _replace_in_two_steps(new: Path, path: Path) -> None:
    aside = _aside(path)
    remove(aside)
    path.rename(aside)
    new.rename(path)
    remove(aside)


def restore_replaced(path: Path) -> None:
    """Put a folder back that was set aside by a process that was killed before the new one was in its place."""
    aside = _aside(path)
    if path.exists():
        remove(aside)
    elif aside.exists():
        aside.rename(path)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Create a folder and mark it as being written to until the block ends; first sweep it if nobody else writes.

    What is swept are temporary files and folders of processes that were killed while they wrote.
    """
    with explained_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sweep_folder(folder)
        flock(descriptor, LOCK_SH)  # the kernel releases it even if the process is killed
        yield
    finally:
        os.close(descriptor)


def sweep_folder(folder: Path) -> None:
    """Remove temporary files and folders of killed processes, unless some process writes to the folder.

    A folder that is missing or may not be written to is left alone.
    """
    if not os.access(folder, os.W_OK):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # somebody writes, or the file system has no locks
            flock(descriptor, LOCK_EX | LOCK_NB)
            for path in folder.glob(".*.tmp"):
                remove(path)
    finally:
        os.close(descriptor)


@contextmanager
def explained_errors(path: Path) -> Iterator[None]:
    """Let an OSError of the block say which file it is about, how much space is free, and what to do.

    Args:
        path: The file that is written, for errors that name none.

    Raises:
        OSError: The block raised one.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _CURES:
            raise
        raise OSError(describe_os_error(error, path)) from error


def describe_os_error(error: OSError, path: Path | None = None) -> str:
    """Return one sentence on what failed and its cure; an error without a number keeps its message."""
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else path
    if error.errno not in _CURES:
        return str(error)
    place = f"{path}: " if path else ""
    free = f" ({_free_mib(path):,.0f} MiB are free there)" if path else ""
    return f"{place}{error.strerror}{free}. {_CURES[error.errno]}."


def _free_mib(path: Path) -> float:
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free / 2**20


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    with explained_errors(path), path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def drop_rows_from_step(path: Path, step: int) -> None:
    """Remove the rows of a JSON Lines file whose ``step`` is this one or later; do nothing if there is no file."""
    if path.exists():
        # Lines of the file, not str.splitlines(): text in a row may contain other line separators, such as U+2028.
        with write_atomically(path) as temporary, path.open(encoding="utf-8") as lines:
            temporary.write_text("".join(line for line in lines if json.loads(line)["step"] < step), encoding="utf-8")

"""An open file -> its rows as fields, one after the other: JSON lines, JSON, Parquet or Arrow.

Takes bytes, gives dictionaries, or what is wrong with a line. Reads on as rows are asked for: what is in memory is a
line, a row group of a Parquet file, a record batch of an Arrow file; a JSON array alone is read whole. Knows nothing of
what the fields mean.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from enum import StrEnum
from typing import Any, BinaryIO

import pyarrow as pa
from pyarrow import ipc, parquet

RawRow = dict[str, Any]
DATA_FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".arrow")
_BATCH = 256  # rows of a Parquet file turned into Python at a time


class Fault(StrEnum):
    """Why a line cannot be read as a row.

    Attributes:
        INVALID_UTF8: Its bytes, or an escape in a string, are not text.
        CUT_LINE: The last line, broken and without a line end: the file was cut.
        BROKEN_JSON: Not a JSON value.
        REPEATED_KEY: A JSON object names a key twice, so one of two values would be lost.
        MISSING_FIELD: A column is not there.
        WRONG_TYPE: Not an object, or a field that is no text, messages or number where one is expected.
    """

    INVALID_UTF8 = "invalid_utf8"
    CUT_LINE = "cut_line"
    BROKEN_JSON = "broken_json"
    REPEATED_KEY = "repeated_key"
    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"


class BadLineError(Exception):
    """A line that cannot be read; `detail` says in words what is wrong."""

    def __init__(self, fault: Fault, detail: str) -> None:
        super().__init__(fault, detail)
        self.fault, self.detail = fault, detail


def read_raw_rows(raw: BinaryIO, file_name: str) -> Iterator[RawRow | BadLineError]:
    """The rows of an open file; the ending of its name says how to read it.

    Raises:
        ValueError: The file is empty or broken as a whole (what is lost then cannot be counted).
    """
    number = 0
    try:
        for row in _rows(raw, file_name):
            number += 1
            yield row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file_name}, after line {number}: broken gzip ({error}). Fetch the file again.") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file_name}, after row {number}: cannot be read ({error}). Fetch the file again.") from error
    if not number:
        raise ValueError(f"{file_name}, line 1: the file is empty, expected rows. Fetch it again or remove it.")


def _rows(raw: BinaryIO, name: str) -> Iterator[RawRow | BadLineError]:
    if name.endswith(".parquet"):
        return _of_batches(parquet.ParquetFile(raw).iter_batches(_BATCH))
    if name.endswith(".arrow"):
        return _of_batches(_arrow(raw))
    opened: Any = gzip.GzipFile(fileobj=raw) if name.endswith(".gz") else raw
    if not name.removesuffix(".gz").endswith(".json"):
        return map(_line, opened)
    start = opened.read(64).lstrip()
    opened.seek(0)
    return _array(opened.read(), name) if start.startswith(b"[") else map(_line, opened)


def _of_batches(batches: Iterator[pa.RecordBatch]) -> Iterator[RawRow]:
    for batch in batches:
        yield from batch.to_pylist()


def _arrow(raw: BinaryIO) -> Iterator[pa.RecordBatch]:
    """A stream, as `datasets` writes it, or a file with its index behind."""
    magic = raw.read(6)
    raw.seek(0)
    if magic != b"ARROW1":
        yield from ipc.open_stream(raw)
        return
    file = ipc.open_file(raw)
    yield from map(file.get_batch, range(file.num_record_batches))


def _array(text: bytes, name: str) -> Iterator[RawRow | BadLineError]:
    try:
        rows = _json(text)
    except BadLineError as error:
        raise ValueError(f"{name}: {error.fault}, {error.detail}. Mend it, or write one row a line.") from error
    assert isinstance(rows, list)
    return map(_object, rows)


def _line(line: bytes) -> RawRow | BadLineError:
    try:
        return _object(_json(line))
    except BadLineError as error:
        return error


def _object(row: object) -> RawRow | BadLineError:
    if isinstance(row, dict):
        return row
    return BadLineError(Fault.WRONG_TYPE, f"expected a JSON object, got {type(row).__name__}")


def _json(text: bytes) -> object:
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise BadLineError(Fault.INVALID_UTF8, str(error)) from error
    except (ValueError, RecursionError) as error:
        fault = Fault.BROKEN_JSON if text.endswith(b"\n") else Fault.CUT_LINE
        raise BadLineError(fault, f"no JSON ({error})") from error


def _unique(items: list[tuple[str, Any]]) -> RawRow:
    found = dict(items)
    if len(found) < len(items):
        raise BadLineError(Fault.REPEATED_KEY, f"a key stands twice among {sorted(key for key, _ in items)}")
    return found

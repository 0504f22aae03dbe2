"""Rows of JSON lines, JSON, CSV, TSV, Parquet and Arrow files, compressed or not.

Files are read while rows are asked for. In memory is one line, one batch of a Parquet file or one record batch of an
Arrow file at a time; only a JSON array is read as a whole.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
from pyarrow import ipc, parquet

from dpo.data.delimited import DELIMITERS, CellRow, DelimitedLine, read_delimited
from dpo.models.hub_errors import UNREADABLE_FROM_HUB, explain_hub_error

_Parsed = TypeVar("_Parsed")
RawRow = dict[str, Any]
DATA_FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", *DELIMITERS, ".parquet", ".arrow")
_BATCH = 256  # rows of a Parquet file that are converted to Python at a time


class Fault(StrEnum):
    """Why a line or row cannot be read.

    Attributes:
        INVALID_UTF8: Its bytes, or an escape sequence in a string, are not valid text.
        CUT_LINE: The last line is broken and has no line end, so the file was probably cut off.
        BROKEN_JSON: It is not valid JSON.
        REPEATED_KEY: A JSON object has a key twice, so that one of two values would be lost.
        MISSING_FIELD: A required column is missing.
        WRONG_TYPE: It is not an object, or a field is not the text, messages or number that it should be.
    """

    INVALID_UTF8 = "invalid_utf8"
    CUT_LINE = "cut_line"
    BROKEN_JSON = "broken_json"
    REPEATED_KEY = "repeated_key"
    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"


class BadLineError(Exception):
    """A row cannot be read.

    Attributes:
        fault: The kind of error, which is counted.
        detail: The error in words.
    """

    def __init__(self, fault: Fault, detail: str) -> None:
        super().__init__(fault, detail)
        self.fault = fault
        self.detail = detail


def read_rows(
    raw: BinaryIO, file_name: str, parse: Callable[[RawRow], _Parsed], skip_bad: bool
) -> Iterator[_Parsed | Fault]:
    """Read and parse the rows of an open file one at a time.

    Args:
        raw: The file, opened in binary mode.
        file_name: Its name, whose suffix decides the format (`DATA_FILE_SUFFIXES`).
        parse: Function of the fields of a row; may raise `BadLineError`.
        skip_bad: Yield the `Fault` of an unreadable row instead of raising an error.

    Raises:
        ValueError: A row is unreadable and `skip_bad` is false; or the file as a whole is empty or broken, which is
            never skipped because nobody could count the lost rows.
    """
    line = 0
    try:
        for line, item in enumerate(_items(raw, file_name), 1):
            try:
                yield parse(_fields(item))
            except BadLineError as error:
                if not skip_bad:
                    place = item.line if isinstance(item, DelimitedLine) else line
                    raise ValueError(
                        f"{file_name}, line {place}: {error.fault}, {error.detail}. "
                        "Fix or remove the row, or skip and count such rows with --data.on_bad_row skip."
                    ) from error
                yield error.fault
    except (EOFError, zlib.error, pa.ArrowInvalid, *UNREADABLE_FROM_HUB) as error:
        reason = explain_hub_error(error) or f"cannot be read ({error}). Download the file again."
        raise ValueError(f"{file_name}, after row {line}: {reason}") from error
    if not line:
        raise ValueError(f"{file_name}, line 1: the file is empty, expected rows. Download it again or remove it.")


def _items(raw: BinaryIO, name: str) -> Iterable[object]:
    """Return the rows as decoded values, or as bytes of JSON that may turn out to be broken."""
    if name.endswith(".parquet"):
        return _rows_of(parquet.ParquetFile(raw).iter_batches(_BATCH))
    if name.endswith(".arrow"):
        return _rows_of(_arrow_batches(raw))
    lines: BinaryIO | gzip.GzipFile = gzip.GzipFile(fileobj=raw) if name.endswith(".gz") else raw
    for suffix, delimiter in DELIMITERS.items():
        if name.endswith(suffix):
            return read_delimited(lines, name, delimiter)
    if not name.removesuffix(".gz").endswith(".json"):
        return lines
    start = lines.read(64).lstrip()
    lines.seek(0)
    return _json_array(lines.read(), name) if start.startswith(b"[") else lines


def _rows_of(batches: Iterator[pa.RecordBatch]) -> Iterator[RawRow]:
    for batch in batches:
        yield from batch.to_pylist()


def _arrow_batches(raw: BinaryIO) -> Iterator[pa.RecordBatch]:
    """Read an Arrow stream, which is what `datasets` writes, or an Arrow file with its index."""
    magic = raw.read(6)
    raw.seek(0)
    if magic != b"ARROW1":
        yield from ipc.open_stream(raw)
        return
    file = ipc.open_file(raw)
    yield from map(file.get_batch, range(file.num_record_batches))


def _json_array(text: bytes, name: str) -> list[object]:
    try:
        rows = _decode_json(text)
    except BadLineError as error:
        raise ValueError(f"{name}: {error.fault}, {error.detail}. Fix the file, or write one row per line.") from error
    assert isinstance(rows, list)
    return rows


def _fields(item: object) -> RawRow:
    if isinstance(item, DelimitedLine):
        return _cell_row(item)
    row = _decode_json(item) if isinstance(item, bytes) else item
    if not isinstance(row, dict):
        raise BadLineError(Fault.WRONG_TYPE, f"expected a JSON object, got {type(row).__name__}")
    return row


def _cell_row(item: DelimitedLine) -> RawRow:
    if problem := item.problem():
        raise BadLineError(Fault.WRONG_TYPE, problem)
    try:
        "".join(item.cells).encode()
    except UnicodeEncodeError as error:
        raise BadLineError(Fault.INVALID_UTF8, f"a cell is no UTF-8 ({error.reason})") from error
    return CellRow(zip(item.header, item.cells, strict=True))


def _decode_json(text: bytes) -> object:
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        raise BadLineError(Fault.INVALID_UTF8, str(error)) from error
    except (ValueError, RecursionError) as error:
        fault = Fault.BROKEN_JSON if text.endswith(b"\n") else Fault.CUT_LINE
        raise BadLineError(fault, f"invalid JSON ({error})") from error


def _unique_keys(items: list[tuple[str, Any]]) -> RawRow:
    fields = dict(items)
    if len(fields) < len(items):
        raise BadLineError(Fault.REPEATED_KEY, f"a key is repeated among {sorted(key for key, _ in items)}")
    return fields

"""A file of log-probabilities, one per answer token, that is memory-mapped and protected by a checksum.

It is a safetensors file with the columns `ids` (hashes of the row ids, ascending), `starts` and `lengths` (where the
values of each row are) and `values`. Its metadata hold the `CacheKey` of everything that decides the values; a file
that was changed, cut off or made for another key is never used.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

CACHE_FORMAT_VERSION = "1"
"""Version of the file format and of how the scorer computes a value; increased whenever either changes."""
SAFETENSORS_DTYPES: dict[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "F32": np.dtype("<f4")}
EMPTY_CHECKSUM = "0" * 64
MISMATCH_REASONS = {
    "version": "it was written by another version of this project",
    "weights": "it belongs to another reference (SHA-256 of its weights)",
    "tokens": "it belongs to other rows or another tokenizer (SHA-256 of all ids and tokens)",
    "precision": "it was computed in another precision",
}

ColumnArrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class CacheKey:
    """Everything that decides the values.

    Attributes:
        weights: SHA-256 of the model's weights.
        tokens: SHA-256 of the ids and tokens of all rows.
        precision: Number formats of the computation.
        version: Version of the file format.
    """

    weights: str
    tokens: str
    precision: str
    version: str = CACHE_FORMAT_VERSION

    @property
    def short_hash(self) -> str:
        """The first 128 bits of the SHA-256 of the key, in hexadecimal; used in the file name."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:32]


def hash_row_id(row_id: str) -> int:
    """Return the id of a row as a signed 64-bit number."""
    return int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8], signed=True)


def allocate_cache_file(file: Path, key: CacheKey, ids: NDArray[np.int64], lengths: NDArray[np.int32]) -> None:
    """Create a file whose values are all zero and whose checksum is empty.

    Args:
        file: Where to write it.
        key: What decides the values.
        ids: Hash of the id of every row, ascending.
        lengths: Tokens of every answer, rows x answers.
    """
    counts = lengths.sum(-1, dtype=np.int64)
    starts = np.cumsum(counts) - counts
    columns = {"ids": ids, "starts": starts, "lengths": lengths, "values": np.zeros(counts.sum(), np.float32)}
    # save_file reads the memory of an array as if it were contiguous.
    contiguous = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    file.touch()
    mode = file.stat().st_mode
    try:
        save_file(contiguous, file, {**asdict(key), "sha256": EMPTY_CHECKSUM})
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(f"{file} cannot be written: {error}. Is the disk full? (DPO_CACHE)") from error
    file.chmod(mode)  # save_file makes a file that only its owner may read


def map_cache_file(file: Path, mode: str) -> ColumnArrays:
    """Memory-map the columns of a file.

    Args:
        file: The file.
        mode: ``r+`` to write changes to the file (several processes may do so), ``c`` to keep them in memory.
    """
    _, columns, start = _read_header(file)
    return {
        name: np.memmap(
            file, SAFETENSORS_DTYPES[column["dtype"]], mode, start + column["data_offsets"][0], tuple(column["shape"])
        )  # type: ignore[call-overload]
        for name, column in columns.items()
    }


def write_checksum(file: Path) -> None:
    """Write the SHA-256 of its content into a file whose values are complete."""
    checksum = _checksum(file)
    with file.open("r+b") as raw:
        header = raw.read(_read_header(file)[2])
        raw.seek(0)
        raw.write(header.replace(EMPTY_CHECKSUM.encode(), checksum.encode(), 1))


def load_cache_file(file: Path, key: CacheKey) -> ColumnArrays:
    """Memory-map the columns of a complete file, after checking it.

    Raises:
        ValueError: The file was cut off or changed, or belongs to another key.
    """
    if problem := _find_problem(file, key):
        raise ValueError(
            f"the cached log-probabilities in {file} cannot be used: {problem}. Remove the file to compute them again."
        )
    return map_cache_file(file, "c")


def _find_problem(file: Path, key: CacheKey) -> str | None:
    try:
        metadata, columns, start = _read_header(file)
        size = start + max(column["data_offsets"][1] for column in columns.values())
        checksum = metadata["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its header cannot be read ({error!r})"
    if file.stat().st_size != size:
        return f"it has the wrong size: expected {size:,} bytes, got {file.stat().st_size:,}"
    if checksum != _checksum(file):
        return "it was changed after it was written: its SHA-256 is not the one in its metadata"
    for name, expected in asdict(key).items():
        if metadata.get(name) != expected:
            return f"{MISMATCH_REASONS[name]}: expected {expected[:32]}, got {str(metadata.get(name))[:32]}"
    return None


def _read_header(file: Path) -> tuple[dict[str, str], dict[str, Any], int]:
    """Return the metadata, the description of every column, and the offset of the columns in bytes."""
    with file.open("rb") as raw:
        size = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(size))
    return header.pop("__metadata__"), header, 8 + size


def _checksum(file: Path) -> str:
    """Return the SHA-256 of everything in the file except this checksum itself."""
    metadata, _, start = _read_header(file)
    with file.open("rb") as raw:
        header = raw.read(start).replace(metadata["sha256"].encode(), b"")
        return hashlib.file_digest(raw, lambda: hashlib.sha256(header)).hexdigest()

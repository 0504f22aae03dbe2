"""Numbers per answer token in one memory-mapped file, with the hash of all that decided them.

Takes a `Key`, ids, lengths and values; gives them back if, and only if, the file is whole, unchanged and of that key.
It is a safetensors file that anything can read: `ids` (hashes, ascending), `starts` and `lengths` of every row,
`values` one after the other. Knows nothing of models.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

CACHE_FORMAT_VERSION = "1"
"""Of the file and of what the scorer means by a number; to be raised with any change of either."""
SAFETENSORS_DTYPES: dict[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "F32": np.dtype("<f4")}
EMPTY_CHECKSUM = "0" * 64
MISMATCH_REASONS = {
    "version": "it was written by another version of this project",
    "weights": "it is of another reference (SHA-256 of its weights)",
    "tokens": "it is of other rows or of another tokenizer (SHA-256 of all ids and tokens)",
    "precision": "it was computed in another precision",
}

ColumnArrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class CacheKey:
    """All that decides the values.

    Attributes:
        weights: SHA-256 of the model's weights.
        tokens: SHA-256 of the ids and tokens of all rows.
        precision: Types that were computed in.
        version: Of this project's file.
    """

    weights: str
    tokens: str
    precision: str
    version: str = CACHE_FORMAT_VERSION

    @property
    def short_hash(self) -> str:
        """A short name that no other key has."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:32]


def hash_row_id(row_id: str) -> int:
    """The id of a row as a number of 64 bits."""
    return int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8], signed=True)


def allocate_cache_file(file: Path, key: CacheKey, ids: NDArray[np.int64], lengths: NDArray[np.int32]) -> None:
    """Make a file for rows in ascending order of their ids, its values still to be written."""
    scored = lengths.sum(-1, dtype=np.int64)
    given = {"ids": ids, "starts": np.cumsum(scored) - scored, "lengths": lengths}
    shapes = [("I64", "ids", ids.shape), ("I64", "starts", ids.shape), ("I32", "lengths", lengths.shape)]
    shapes.append(("F32", "values", (int(scored.sum()),)))
    header: dict[str, Any] = {"__metadata__": {**asdict(key), "sha256": EMPTY_CHECKSUM}}
    end = 0
    for kind, name, shape in shapes:
        begin, end = end, end + SAFETENSORS_DTYPES[kind].itemsize * int(np.prod(shape))
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that all numbers are aligned
    with file.open("wb") as raw:
        raw.write(len(text).to_bytes(8, "little") + text)
        raw.truncate(8 + len(text) + end)
    columns = map_cache_file(file, "r+")
    for name, values in given.items():
        columns[name][:] = values


def map_cache_file(file: Path, mode: str) -> ColumnArrays:
    """The columns of a file, memory-mapped; of mode ``r+`` they are written through, of mode ``c`` never."""
    header, start = _header(file)
    return {
        name: np.memmap(
            file, SAFETENSORS_DTYPES[entry["dtype"]], mode, start + entry["data_offsets"][0], tuple(entry["shape"])
        )  # type: ignore[call-overload]
        for name, entry in header.items()
        if name != "__metadata__"
    }


def write_checksum(file: Path) -> None:
    """Write the SHA-256 of the whole into a file whose values are all there."""
    digest = _digest(file)
    with file.open("r+b") as raw:
        text = raw.read(8 + int.from_bytes(raw.read(8), "little"))
        raw.seek(8)
        raw.write(text.replace(EMPTY_CHECKSUM.encode(), digest.encode(), 1))


def load_cache_file(file: Path, key: CacheKey) -> ColumnArrays:
    """The columns of a file, memory-mapped.

    Raises:
        ValueError: It was cut or changed, or is of another key; says which.
    """
    try:
        header, start = _header(file)
        about = header["__metadata__"]
        size = start + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        _refuse(file, f"it has no header that can be read ({error!r})")
    if file.stat().st_size != size:
        _refuse(file, f"it was cut: expected {size:,} bytes, got {file.stat().st_size:,}")
    if about.get("sha256") != _digest(file):
        _refuse(file, "it was changed after it was written: its SHA-256 is not the one that it holds")
    for name, expected in asdict(key).items():
        if about.get(name) != expected:
            _refuse(file, f"{MISMATCH_REASONS[name]}: expected {expected[:32]}, got {str(about.get(name))[:32]}")
    return map_cache_file(file, "c")


def _refuse(file: Path, reason: str) -> NoReturn:
    raise ValueError(
        f"the cached log-probabilities in {file} are not used, {reason}. Remove the file to compute them anew."
    )


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """What a file says of itself, and where its numbers begin."""
    with file.open("rb") as raw:
        size = int.from_bytes(raw.read(8), "little")
        return json.loads(raw.read(size)), 8 + size


def _digest(file: Path) -> str:
    """SHA-256 of everything in a file but this hash itself."""
    header, start = _header(file)
    with file.open("rb") as raw:
        text = raw.read(start).replace(header["__metadata__"]["sha256"].encode(), b"")
        return hashlib.file_digest(raw, lambda: hashlib.sha256(text)).hexdigest()

"""Tokenized rows on disk: one memory-mapped Arrow file per split, built once.

A store is a folder named by the hash of everything that decides its content. It has a row for every line that was read;
an unused line has the reason and no tokens, so that the audit can count it. Sources are read in turn, from where they
are, so neither memory nor disk needs room for a whole source: only the store itself grows. The SHA-256 of every file is
kept beside them, and `find_damage` compares them once at the start of every verb.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import fsspec
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from rich.progress import Progress

from dpo.data.audit import KEPT_VERDICT, Audit
from dpo.data.columns import PairRow
from dpo.data.dialogue import DialoguePair, Refusal
from dpo.data.exclusion import Exclusion
from dpo.data.formats import Fault, read_rows
from dpo.data.plain import row_parser
from dpo.data.sources import SourceFile, splits_of
from dpo.data.tokenization import EncodedPair, PairEncoder, TextFormat
from dpo.files import explained_errors, file_sha256, hold_folder, write_atomically
from dpo.secrets import reveal_address

STORE_VERSION = 3
"""Version of the columns and their meaning; increased whenever they change."""
DIGESTS_FILE = "sha256.json"
_BATCH = 256  # rows tokenized together: enough to keep all cores busy, few enough for any memory

_TOKENS = List(Value("int32"))
_FEATURES = Features(
    {
        "subset": Value("string"),
        "line": Value("int64"),  # counted through all files of the subset in this split
        "verdict": Value("string"),
        "turns": Value("int32"),  # human turns of the whole prompt, before truncation
        "opening": Value("float64"),  # hash of the first human turn, uniform in [0, 1)
        "chosen_chars": Value("int32"),
        "rejected_chars": Value("int32"),
        "prompt": _TOKENS,
        "chosen": _TOKENS,
        "rejected": _TOKENS,
        "turns_dropped": Value("int32"),
        "prompt_cut": Value("bool"),
        "chosen_cut": Value("bool"),
        "rejected_cut": Value("bool"),
        "weight": Value("float64"),
        "margin": Value("float64"),  # NaN if the row has none
    }
)


def store_sha256(sources: Sequence[SourceFile], encoder: PairEncoder, limit: int | None, skip_bad: bool) -> str:
    """Return the SHA-256 of everything that decides the content of the store."""
    files = [(source.subset, source.split, vars(source.columns), source.content_id()) for source in sources]
    content = json.dumps([STORE_VERSION, files, encoder.content_sha256, limit, skip_bad])
    return hashlib.sha256(content.encode()).hexdigest()


def build_store(
    folder: Path, sources: Sequence[SourceFile], encoder: PairEncoder, limit: int | None, skip_bad: bool
) -> None:
    """Tokenize the sources into a folder, which appears only when it is complete, and replaces a damaged one.

    Args:
        folder: The folder to create; left alone if it is there and intact.
        sources: Files to read.
        encoder: Tokenizes the pairs.
        limit: Maximum number of rows per file, from its start. None: all.
        skip_bad: Count unreadable rows and go on, instead of stopping at the first.

    Raises:
        ValueError: A row or a file cannot be read; the message names the file and line and says what to do.
        OSError: The folder cannot be written.
    """
    if folder.is_dir() and not find_damage(folder):
        return
    with hold_folder(folder.parent), write_atomically(folder) as unfinished:
        unfinished.mkdir()
        with Progress("Tokenizing {task.description}", *Progress.get_default_columns()[1:]) as bar:
            for split in splits_of(sources):
                lines = {source.subset: count(1) for source in sources}
                tables = (
                    _table(source, rows, lines[source.subset], encoder)
                    for source in sources
                    if source.split == split
                    for rows in _batches(source, encoder.format, limit, skip_bad, bar)
                )
                _write(unfinished / f"{split}.arrow", tables)
        audits = {split: audit_split(unfinished, split).to_dict() for split in splits_of(sources)}
        (unfinished / "audit.json").write_text(json.dumps(audits, indent=2) + "\n")
        digests = {file.name: file_sha256(file) for file in sorted(unfinished.iterdir())}
        (unfinished / DIGESTS_FILE).write_text(json.dumps(digests, indent=2) + "\n")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # so that later forks are safe and raise no warning


def find_damage(folder: Path) -> str:
    """Return which file of a store is not as it was written, and why; empty if all are.

    Every byte is read, at the speed of the disk or of SHA-256, whichever is slower.
    """
    digests = folder / DIGESTS_FILE
    try:
        expected = json.loads(digests.read_text())
    except (OSError, ValueError) as error:
        return f"{digests}, which holds the SHA-256 of every file, cannot be read ({error})"
    for name, digest in expected.items():
        file = folder / name
        if not file.is_file():
            return f"{file} is gone"
        if file_sha256(file) != digest:
            return f"{file} was changed or cut off after it was written: its SHA-256 is not the one in {DIGESTS_FILE}"
    return ""


def _write(file: Path, tables: Iterable[dict[str, list[Any]]]) -> None:
    with explained_errors(file), ArrowWriter(features=_FEATURES, path=str(file)) as writer:
        for table in tables:
            writer.write_batch(table)
        writer.finalize()


def load_split(folder: Path, split: str) -> Dataset:
    """Memory-map the rows of a split."""
    return Dataset.from_file(str(folder / f"{split}.arrow"))


def audit_split(folder: Path, split: str, exclusion: Exclusion | None = None) -> Audit:
    """Count the rows of a split, and which of them are excluded."""
    table = load_split(folder, split).data.table
    return Audit.from_table(split, table, exclusion.marked_rows(table, split) if exclusion else None)


def _batches(
    source: SourceFile, format: TextFormat, limit: int | None, skip_bad: bool, bar: Progress
) -> Iterator[Sequence[PairRow | Fault]]:
    files, path = fsspec.url_to_fs(reveal_address(source.file))
    size = files.size(path)
    label = f"{source.subset}/{source.split}"
    for finished in bar.task_ids:  # one line, which is overwritten
        bar.remove_task(finished)
    with files.open(path, "rb") as opened, bar.wrap_file(opened, total=size, description=label) as raw:
        rows = islice(read_rows(raw, source.file, row_parser(source.columns, format), skip_bad), limit)
        while batch := list(islice(rows, _BATCH)):
            yield batch
    bar.update(bar.task_ids[-1], completed=size)  # with a limit, the file is not read to its end


def _table(
    source: SourceFile, rows: Sequence[PairRow | Fault], lines: Iterator[int], encoder: PairEncoder
) -> dict[str, list[Any]]:
    pairs = [row.pair for row in rows if isinstance(row, PairRow) and isinstance(row.pair, DialoguePair)]
    encoded = iter(encoder.encode_batch(pairs))
    records = [{"subset": source.subset, "line": next(lines), **_values(row, encoded)} for row in rows]
    return {name: [record[name] for record in records] for name in _FEATURES}


def _values(row: PairRow | Fault, encoded: Iterator[EncodedPair | Refusal]) -> dict[str, Any]:
    """Return the stored values of a row; `encoded` goes on with the result of the next pair."""
    if isinstance(row, Fault):
        return _unused(row)
    if isinstance(row.pair, Refusal):
        return _unused(row.pair)
    result = next(encoded)
    if isinstance(result, Refusal):
        return _unused(result)
    return {
        "verdict": KEPT_VERDICT,
        "turns": row.pair.exchange_count + 1,
        "opening": _uniform_hash(row.pair.opening_text),
        "chosen_chars": len(row.pair.chosen),
        "rejected_chars": len(row.pair.rejected),
        "weight": row.weight,
        "margin": math.nan if row.margin is None else row.margin,
        **vars(result),
    }


def _unused(reason: Refusal | Fault) -> dict[str, Any]:
    nothing = {"turns": 0, "opening": 0.0, "chosen_chars": 0, "rejected_chars": 0, "weight": 0.0, "margin": math.nan}
    return {"verdict": reason.value, **nothing, **vars(EncodedPair([], [], []))}


def _uniform_hash(text: str) -> float:
    """Return a hash in [0, 1): 52 bits of the SHA-256, which a float holds exactly."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:13], 16) / 16**13

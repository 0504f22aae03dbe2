"""Rows of files -> tokens on disk: one Arrow file a split, tokenised once, memory-mapped ever after.

Takes sources and an encoder; gives a folder, to be named by the hash of all that decides its content. Every line that
was read is a row there, an unused one with its reason and no tokens, so that the audit can count them all. Sources are
read one after the other and straight from where they are, so that neither memory nor disk needs room for any of them:
what grows is the folder alone. Knows nothing of batches, validation splits or Lightning.
"""

import hashlib
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from errno import ENOSPC
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from rich.progress import Progress

from dpo.data.audit import KEPT_VERDICT, Audit
from dpo.data.columns import PairRow
from dpo.data.dialogue import DialoguePair, Refusal
from dpo.data.formats import Fault
from dpo.data.sources import SPLITS, BadRow, SourceFile, read_pair_rows
from dpo.data.tokenization import EncodedPair, PairEncoder

STORE_VERSION = 2
"""Of the columns and their meaning; to be raised with any change of them."""
_BATCH = 256  # rows tokenised together: enough for all cores, little enough for any memory

_TOKENS = List(Value("int32"))
_FEATURES = Features(
    {
        "subset": Value("string"),
        "line": Value("int64"),  # of the subset's files in this split, one behind the other
        "verdict": Value("string"),
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
        "margin": Value("float64"),  # NaN: none is given
    }
)


def store_sha256(sources: Sequence[SourceFile], encoder: PairEncoder, limit: int | None, skip_bad: bool) -> str:
    """SHA-256 of everything that decides the content of the store."""
    files = [(source.subset, source.split, vars(source.columns), source.content_id()) for source in sources]
    content = json.dumps([STORE_VERSION, files, encoder.content_sha256, limit, skip_bad])
    return hashlib.sha256(content.encode()).hexdigest()


def build_store(
    folder: Path, sources: Sequence[SourceFile], encoder: PairEncoder, limit: int | None, skip_bad: bool
) -> None:
    """Tokenise the sources into `folder`; nothing is there before all is done.

    Args:
        folder: Where to; stays as it is if it exists by then (another process was faster).
        sources: What to read.
        encoder: Makes tokens of pairs.
        limit: Most rows of each file, from its start.
        skip_bad: Count unreadable rows and go on, instead of stopping at the first.

    Raises:
        ValueError: A row or a file cannot be read; the message names file and line and says what to do.
        OSError: Nothing can be written there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        made.mkdir()
        with Progress("Tokenising {task.description}", *Progress.get_default_columns()[1:]) as bar:
            for split in SPLITS:
                parts = [source for source in sources if source.split == split]
                tables = (table for part in parts for table in _tokenised(part, encoder, limit, skip_bad, bar))
                _write(made / f"{split}.arrow", _numbered(tables))
        audits = {split: audit_split(made, split).to_dict() for split in SPLITS}
        (made / "audit.json").write_text(json.dumps(audits, indent=2) + "\n")
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forks from here on are safe and silent


def _write(file: Path, tables: Iterable[dict[str, list[Any]]]) -> None:
    try:
        with ArrowWriter(features=_FEATURES, path=str(file)) as writer:
            for table in tables:
                writer.write_batch(table)
            writer.finalize()
    except OSError as error:
        if error.errno == ENOSPC:  # which does not say where
            raise OSError(f"{error}: {file}. Make room, or name another folder: DPO_CACHE.") from error
        raise


def load_split(folder: Path, split: str) -> Dataset:
    """The rows of a split, memory-mapped."""
    return Dataset.from_file(str(folder / f"{split}.arrow"))


def audit_split(folder: Path, split: str) -> Audit:
    """Count the rows of a split."""
    return Audit.from_table(split, load_split(folder, split).data.table)


def _numbered(tables: Iterable[dict[str, list[Any]]]) -> Iterator[dict[str, list[Any]]]:
    """Count the lines of a subset on from file to file, so that subset and line name a row."""
    seen: Counter[str] = Counter()
    for table in tables:
        first = seen[table["subset"][0]] + 1
        table["line"] = list(range(first, first + len(table["subset"])))
        seen.update(table["subset"])
        yield table


def _tokenised(
    source: SourceFile, encoder: PairEncoder, limit: int | None, skip_bad: bool, bar: Progress
) -> Iterator[dict[str, list[Any]]]:
    files, path = fsspec.url_to_fs(source.file)
    size = files.size(path)
    with files.open(path, "rb") as opened:
        label = f"{source.subset}/{source.split}"
        with bar.wrap_file(opened, total=size, description=label) as raw:
            rows = read_pair_rows(raw, source.file, source.columns, limit)
            while batch := list(islice(rows, _BATCH)):
                bad = next((row for row in batch if isinstance(row, BadRow)), None)
                if bad and not skip_bad:
                    raise ValueError(
                        f"{source.file}, line {bad.line}: {bad.fault}, {bad.detail}. "
                        "Mend or remove it, or let --data.on_bad_row skip leave out and count such rows."
                    )
                yield _columns(source, batch, encoder)
        bar.update(bar.task_ids[-1], completed=size)  # a limit may end it earlier


def _columns(source: SourceFile, rows: Sequence[PairRow | BadRow], encoder: PairEncoder) -> dict[str, list[Any]]:
    pairs = [row.pair for row in rows if isinstance(row, PairRow) and isinstance(row.pair, DialoguePair)]
    encoded = iter(encoder.encode_batch(pairs))
    records = [{"subset": source.subset, "line": 0, **_values(row, encoded)} for row in rows]
    return {name: [record[name] for record in records] for name in _FEATURES}


def _values(row: PairRow | BadRow, encoded: Iterator[EncodedPair | Refusal]) -> dict[str, Any]:
    """What is stored of a row; the next of `encoded` is that of the next pair."""
    if isinstance(row, BadRow):
        return _unused(row.fault)
    if isinstance(row.pair, Refusal):
        return _unused(row.pair)
    made = next(encoded)
    if isinstance(made, Refusal):
        return _unused(made)
    return {
        "verdict": KEPT_VERDICT,
        "opening": _uniform(row.pair.opening_text),
        "chosen_chars": len(row.pair.chosen),
        "rejected_chars": len(row.pair.rejected),
        "weight": row.weight,
        "margin": math.nan if row.margin is None else row.margin,
        **vars(made),
    }


def _unused(reason: Refusal | Fault) -> dict[str, Any]:
    nothing = {"opening": 0.0, "chosen_chars": 0, "rejected_chars": 0, "weight": 0.0, "margin": math.nan}
    return {"verdict": reason.value, **nothing, **vars(EncodedPair([], [], []))}


def _uniform(text: str) -> float:
    """A hash as a number in [0, 1): 52 of its bits, which a float holds exactly."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:13], 16) / 16**13

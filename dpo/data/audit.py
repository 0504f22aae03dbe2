"""The table of tokenised rows -> what was read, kept, refused and cut, subset by subset.

Takes the columns that `dpo.data.store` writes; gives numbers, as a table for people and as plain values for files
and loggers. Knows nothing of files or tokenizers.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.table import Table

from dpo.data.dialogue import Refusal
from dpo.data.formats import Fault

KEPT_VERDICT = "kept"
"""The verdict on a row that is used; the others are the values of `Fault` and `Refusal`."""
_VERDICTS = (KEPT_VERDICT, *Refusal, *Fault)
_SIDES = ("prompt", "chosen", "rejected")
_CUTS = ("turns_dropped", "prompt_cut", "chosen_cut", "rejected_cut")


@dataclass(frozen=True)
class LengthSummary:
    """Of one part of the kept pairs, in tokens (zeros where none is kept)."""

    mean: float
    median: float
    p95: float
    max: int

    @classmethod
    def from_lengths(cls, lengths: NDArray[Any]) -> "LengthSummary":
        """Summarise lengths."""
        if not len(lengths):
            return cls(0.0, 0.0, 0.0, 0)
        median, p95 = np.percentile(lengths, (50, 95))
        return cls(float(lengths.mean()), float(median), float(p95), int(lengths.max()))


@dataclass(frozen=True)
class SubsetCounts:
    """Of one subset, or of all.

    Attributes:
        read: Lines read; ``kept``, ``refused`` and ``bad`` add up to it.
        kept: Pairs that are used.
        refused: Readable rows that are not used, by reason.
        bad: Unreadable rows that were skipped, by fault.
        tokens: Lengths of ``prompt``, ``chosen`` and ``rejected``.
        cut: Share of the kept pairs that lost something to the maximal length: ``turns_dropped`` (oldest of
            the prompt), ``prompt_cut`` (start of what remained), ``chosen_cut``, ``rejected_cut`` (ends).
        longer_wins: Accuracy of preferring the answer with more characters; a tie counts half.
    """

    read: int
    kept: int
    refused: dict[str, int]
    bad: dict[str, int]
    tokens: dict[str, LengthSummary]
    cut: dict[str, float]
    longer_wins: float

    @classmethod
    def from_columns(cls, columns: dict[str, NDArray[Any]]) -> "SubsetCounts":
        """Count rows; ``verdict`` is an index of `_VERDICTS`, sides are lengths in tokens."""
        verdicts = {name: int((columns["verdict"] == code).sum()) for code, name in enumerate(_VERDICTS)}
        kept = {name: column[columns["verdict"] == _VERDICTS.index(KEPT_VERDICT)] for name, column in columns.items()}
        count = cls(
            read=len(columns["verdict"]),
            kept=verdicts[KEPT_VERDICT],
            refused={reason.value: verdicts[reason] for reason in Refusal},
            bad={fault.value: verdicts[fault] for fault in Fault},
            tokens={side: LengthSummary.from_lengths(kept[side]) for side in _SIDES},
            cut={name: _mean(kept[name] > 0) for name in _CUTS},
            longer_wins=_mean((1 + np.sign(kept["chosen_chars"] - kept["rejected_chars"])) / 2),
        )
        assert count.kept + sum(count.refused.values()) + sum(count.bad.values()) == count.read
        return count


@dataclass(frozen=True)
class Audit:
    """Of one split: the counts of each subset, and of all together under ``total``."""

    split: str
    counts_by_subset: dict[str, SubsetCounts]

    @classmethod
    def from_table(cls, split: str, table: pa.Table) -> "Audit":
        """Audit a split's rows; the memory it takes is a few numbers a row, not their tokens."""
        columns = {name: table[name].to_numpy() for name in (*_CUTS, "chosen_chars", "rejected_chars")}
        columns |= {side: pc.list_value_length(table[side]).to_numpy() for side in _SIDES}
        columns["verdict"] = pc.index_in(table["verdict"], pa.array(_VERDICTS, pa.string())).to_numpy()
        counts = {}
        for name in pc.unique(table["subset"]).to_pylist():
            there = pc.equal(table["subset"], name).to_numpy()
            counts[name] = SubsetCounts.from_columns({key: column[there] for key, column in columns.items()})
        return cls(split, counts | {"total": SubsetCounts.from_columns(columns)})

    def to_dict(self) -> dict[str, Any]:
        """Plain values: subset -> what `Count` says."""
        return {name: asdict(count) for name, count in self.counts_by_subset.items()}

    def to_rich_table(self) -> Table:
        """For a person: one column a subset; reasons that never held are left out."""
        # With a single subset, its column would be that of the total again.
        shown = {
            name: count
            for name, count in self.counts_by_subset.items()
            if name != "total" or len(self.counts_by_subset) > 2
        }
        table = Table(title=f"What was read of {self.split}", title_justify="left", box=SIMPLE, pad_edge=False)
        table.add_column("rows", overflow="fold")
        for name in shown:
            table.add_column(name.replace("-", "-\n"), justify="right", overflow="fold")
        for sections in zip(*map(_sections, shown.values()), strict=True):
            for label in sections[0]:
                values = [section[label] for section in sections]
                if set(values) != {""}:
                    table.add_row(label, *values)
            table.add_section()
        return table


def _sections(count: SubsetCounts) -> list[dict[str, str]]:
    """One column of the table: label -> value, section by section."""
    rows = {"read": count.read}
    for name, reasons in (("bad", count.bad), ("refused", count.refused)):
        rows |= {name: sum(reasons.values())} | {f"  {reason}": number for reason, number in reasons.items()}
    rows["kept"] = count.kept
    tokens = {
        f"{side} tokens, {measure}": f"{value:.0f}"
        for side, lengths in count.tokens.items()
        for measure, value in vars(lengths).items()
    }
    shares = {name.replace("_", " "): f"{share:.1%}" for name, share in count.cut.items()}
    shares["longer answer wins"] = f"{count.longer_wins:.1%}"
    return [{label: f"{number:,}" if number else "" for label, number in rows.items()}, tokens, shares]


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else 0.0

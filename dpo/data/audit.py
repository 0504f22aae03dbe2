"""Counts of the rows that were read, kept, refused and cut, per subset.

They are computed from the columns that `dpo.data.store` writes, and shown as a table or written as plain values.
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
"""The verdict on a row that is used; all other verdicts are values of `Fault` and `Refusal`."""
EXCLUDED_VERDICT = "excluded"
"""The verdict on a pair that ``--data.exclude`` leaves out."""
_VERDICTS = (KEPT_VERDICT, *Refusal, *Fault, EXCLUDED_VERDICT)
_SIDES = ("prompt", "chosen", "rejected")
_CUTS = ("turns_dropped", "prompt_cut", "chosen_cut", "rejected_cut")


@dataclass(frozen=True)
class LengthSummary:
    """Lengths of the prompts, or of one answer, of the kept pairs in tokens; zeros if no pair is kept."""

    mean: float
    median: float
    p95: float
    max: int

    @classmethod
    def from_lengths(cls, lengths: NDArray[Any]) -> "LengthSummary":
        """Summarize an array of lengths."""
        if not len(lengths):
            return cls(0.0, 0.0, 0.0, 0)
        median, p95 = np.percentile(lengths, (50, 95))
        return cls(float(lengths.mean()), float(median), float(p95), int(lengths.max()))


@dataclass(frozen=True)
class SubsetCounts:
    """Counts of one subset, or of all subsets together.

    Attributes:
        read: Number of rows read, the sum of `kept`, `refused`, `bad` and `excluded`.
        kept: Number of pairs that are used.
        refused: Number of readable rows that are not used, by reason.
        bad: Number of unreadable rows that were skipped, by fault.
        excluded: Number of pairs that ``--data.exclude`` leaves out.
        tokens: Lengths of ``prompt``, ``chosen`` and ``rejected``.
        cut: Share of the kept pairs that were shortened to the maximum length: ``turns_dropped`` (oldest turns of the
            prompt), ``prompt_cut`` (start of what remained), ``chosen_cut`` and ``rejected_cut`` (end of an answer).
        longer_wins: Accuracy of always preferring the answer with more characters; a tie counts half.
    """

    read: int
    kept: int
    refused: dict[str, int]
    bad: dict[str, int]
    excluded: int
    tokens: dict[str, LengthSummary]
    cut: dict[str, float]
    longer_wins: float

    @classmethod
    def from_columns(cls, columns: dict[str, NDArray[Any]]) -> "SubsetCounts":
        """Count rows, given the index of each verdict in `_VERDICTS` and the length of each side in tokens."""
        verdicts = {name: int((columns["verdict"] == code).sum()) for code, name in enumerate(_VERDICTS)}
        kept = {name: column[columns["verdict"] == _VERDICTS.index(KEPT_VERDICT)] for name, column in columns.items()}
        count = cls(
            read=len(columns["verdict"]),
            kept=verdicts[KEPT_VERDICT],
            refused={reason.value: verdicts[reason] for reason in Refusal},
            bad={fault.value: verdicts[fault] for fault in Fault},
            excluded=verdicts[EXCLUDED_VERDICT],
            tokens={side: LengthSummary.from_lengths(kept[side]) for side in _SIDES},
            cut={name: _mean(kept[name] > 0) for name in _CUTS},
            longer_wins=_mean((1 + np.sign(kept["chosen_chars"] - kept["rejected_chars"])) / 2),
        )
        assert count.kept + sum((*count.refused.values(), *count.bad.values(), count.excluded)) == count.read
        return count


@dataclass(frozen=True)
class Audit:
    """Counts of one split.

    Attributes:
        split: Name of the split.
        counts_by_subset: Counts of each subset, and of all together under ``total``.
    """

    split: str
    counts_by_subset: dict[str, SubsetCounts]

    @classmethod
    def from_table(cls, split: str, table: pa.Table, excluded: NDArray[np.bool_] | None = None) -> "Audit":
        """Count the rows of a split, and which of them are excluded; the tokens are not read into memory."""
        columns = {name: table[name].to_numpy() for name in (*_CUTS, "chosen_chars", "rejected_chars")}
        columns |= {side: pc.list_value_length(table[side]).to_numpy() for side in _SIDES}
        columns["verdict"] = pc.index_in(table["verdict"], pa.array(_VERDICTS, pa.string())).to_numpy()
        if excluded is not None:
            columns["verdict"] = np.where(excluded, _VERDICTS.index(EXCLUDED_VERDICT), columns["verdict"])
        counts = {}
        for name in pc.unique(table["subset"]).to_pylist():
            in_subset = pc.equal(table["subset"], name).to_numpy()
            counts[name] = SubsetCounts.from_columns({key: column[in_subset] for key, column in columns.items()})
        return cls(split, counts | {"total": SubsetCounts.from_columns(columns)})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of `SubsetCounts` by subset, as values that JSON can represent."""
        return {name: asdict(count) for name, count in self.counts_by_subset.items()}

    def to_rich_table(self) -> Table:
        """Return a table for people with one column per subset; reasons that never occurred are left out."""
        # With a single subset, the total would repeat its column.
        shown = {
            name: count
            for name, count in self.counts_by_subset.items()
            if name != "total" or len(self.counts_by_subset) > 2
        }
        table = Table(title=f"Rows of the {self.split} split", title_justify="left", box=SIMPLE, pad_edge=False)
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
    """Return one column of the table: the values by label, for each section."""
    rows = {"read": count.read}
    for name, reasons in (("bad", count.bad), ("refused", count.refused)):
        rows |= {name: sum(reasons.values())} | {f"  {reason}": number for reason, number in reasons.items()}
    rows |= {"excluded": count.excluded, "kept": count.kept}
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

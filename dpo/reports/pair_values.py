"""The ledger of a run as arrays: the pairs of one validation, and the margins of every pair over the whole run.

Both are computed where the rows are, by Arrow: memory holds one value per pair, however often it was measured.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import acero

from dpo.runs.folder import Run
from dpo.runs.ledger import open_ledger

Numbers = NDArray[np.float64]
VALIDATION_COLUMNS = (
    "id",
    "subset",
    "chosen_tokens",
    "rejected_tokens",
    "chosen_logp",
    "rejected_logp",
    "reference_chosen_logp",
    "chosen_reward",
    "rejected_reward",
    "loss",
)


@dataclass(frozen=True)
class PairValues:
    """What one validation measured of every pair; all arrays have one value per pair.

    Attributes:
        step: Optimizer steps taken before it.
        ids: Names of the pairs.
        margins: Reward of the chosen answer minus that of the rejected one.
        length_differences: Tokens of the chosen answer minus those of the rejected one.
        likelihood_differences: Log-probability of the chosen answer minus that of the rejected one, nats.
        chosen_logratios: Log-probability of the chosen answer under the policy minus the reference, nats; nan without
            a reference.
        losses: Losses.
    """

    step: int
    ids: pa.ChunkedArray
    margins: Numbers
    length_differences: Numbers
    likelihood_differences: Numbers
    chosen_logratios: Numbers
    losses: Numbers

    def __len__(self) -> int:
        return len(self.margins)


@dataclass(frozen=True)
class MarginCourse:
    """Mean and spread of the margin of every pair over all its measurements; all arrays have one value per pair.

    Attributes:
        ids: Names of the pairs.
        splits: ``train`` or ``val``.
        means: Means of the margin.
        spreads: Standard deviations of the margin, dividing by the number of measurements.
        counts: Numbers of measurements.
    """

    ids: pa.ChunkedArray
    splits: pa.ChunkedArray
    means: Numbers
    spreads: Numbers
    counts: NDArray[np.int64]

    def shared_pairs(self) -> int:
        """Return the number of pairs that occur in both splits, by their names."""
        return len(self.ids) - int(pc.count_distinct(self.ids).as_py())

    def lowest_means(self, count: int) -> list[tuple[str, str, float, int]]:
        """Return name, split, mean margin and number of measurements of the pairs with the lowest means."""
        order = np.argsort(self.means, kind="stable")[:count]
        columns = (self.ids.take(order).to_pylist(), self.splits.take(order).to_pylist())
        return list(zip(*columns, self.means[order].tolist(), self.counts[order].tolist(), strict=True))


@dataclass(frozen=True)
class PairLedger:
    """The measurements of single pairs that a run has written.

    Attributes:
        rows: Its Parquet files as one data set.
    """

    rows: Any

    @classmethod
    def of_run(cls, run: Run) -> "PairLedger | None":
        """Return the ledger of a run, None if it has none."""
        rows = open_ledger(run) if run.ledger_path.is_dir() else None
        return cls(rows) if rows is not None and rows.files else None

    def validation_steps(self) -> list[int]:
        """Return the steps at which validation pairs were measured, in order."""
        steps = self.rows.to_table(columns=["step"], filter=_is_validation())["step"]
        return sorted(pc.unique(steps).to_pylist())

    def validation_at(self, step: int) -> PairValues:
        """Return what was measured of the validation pairs at a step."""
        rows = self.rows.to_table(
            columns=list(VALIDATION_COLUMNS), filter=_is_validation() & (pc.field("step") == step)
        )
        values = {name: _as_numbers(rows[name]) for name in VALIDATION_COLUMNS[2:]}
        return PairValues(
            step=step,
            ids=rows["id"],
            margins=values["chosen_reward"] - values["rejected_reward"],
            length_differences=values["chosen_tokens"] - values["rejected_tokens"],
            likelihood_differences=values["chosen_logp"] - values["rejected_logp"],
            chosen_logratios=values["chosen_logp"] - values["reference_chosen_logp"],
            losses=values["loss"],
        )

    def margin_course(self) -> MarginCourse:
        """Return mean and spread of the margin of every pair, in training steps and validations alike."""
        margin = pc.field("chosen_reward").cast(pa.float64()) - pc.field("rejected_reward").cast(pa.float64())
        names = ["split", "id", "chosen_reward", "rejected_reward"]
        aggregates = [("margin", f"hash_{name}", None, name) for name in ("mean", "stddev", "count")]
        plan = [
            acero.Declaration("scan", acero.ScanNodeOptions(self.rows, columns=names)),
            acero.Declaration(
                "project", acero.ProjectNodeOptions([*map(pc.field, names[:2]), margin], ["split", "id", "margin"])
            ),
            acero.Declaration("aggregate", acero.AggregateNodeOptions(aggregates, keys=["split", "id"])),
        ]
        table = acero.Declaration.from_sequence(plan).to_table()
        return MarginCourse(
            ids=table["id"],
            splits=table["split"],
            means=_as_numbers(table["mean"]),
            spreads=_as_numbers(table["stddev"]),
            counts=table["count"].to_numpy(),
        )


def match_pairs(first: PairValues, second: PairValues) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where the pairs that both have are in the first and in the second, in the same order."""
    places = pc.index_in(first.ids, value_set=second.ids.combine_chunks())
    found = pc.is_valid(places).to_numpy()
    return np.flatnonzero(found), pc.drop_null(places).to_numpy().astype(np.int64)


def _is_validation() -> Any:
    return (pc.field("split") == "val") & ~pc.field("trained")


def _as_numbers(column: pa.ChunkedArray) -> Numbers:
    return np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64)  # nulls become nan

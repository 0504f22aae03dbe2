"""Accuracy and loss of groups of pairs, with intervals, beside what needs no training.

Pairs are grouped by their subset, by the human turns of the prompt, and by how many tokens longer the chosen answer is
than the rejected one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Column, Table

from dpo.runs.intervals import mean_interval

LENGTH_BUCKETS = 5  # of as many pairs as ties allow
CHANCE = 0.5
_Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class GroupValue:
    """A mean over pairs and the ends of its 95 % bootstrap interval.

    Attributes:
        value: The mean.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of_mean(cls, values: NDArray[Any]) -> "GroupValue":
        """Return the mean of values, whose order does not matter."""
        return cls(float(values.mean()), *mean_interval(np.sort(values)))


@dataclass(frozen=True)
class PairGroup:
    """What was measured of a group of pairs. Accuracies count strict inequalities, as in the metrics.

    Attributes:
        by: What the pairs of the group share: ``all``, ``subset``, ``turns`` or ``tokens longer``.
        name: The group's value of it.
        pairs: Number of pairs.
        accuracy: Share of the pairs whose chosen answer has the higher reward.
        loss: Mean loss.
        longer: Share of the pairs whose chosen answer is longer; a tie, where one would have to guess, counts half.
        reference: Share of the pairs whose chosen answer has the higher log-probability under the reference. None: no
            reference.
    """

    by: str
    name: str
    pairs: int
    accuracy: GroupValue
    loss: GroupValue
    longer: GroupValue
    reference: GroupValue | None

    @property
    def length_baseline(self) -> tuple[str, GroupValue]:
        """The better of the two rules "the longer answer wins" and "the shorter answer wins", by name."""
        longer = self.longer
        if longer.value >= CHANCE:
            return "longer", longer
        return "shorter", GroupValue(1 - longer.value, 1 - longer.high, 1 - longer.low)


def measure_groups(rows: pa.Table) -> list[PairGroup]:
    """Measure all pairs and every group of them; nothing without pairs.

    Args:
        rows: Columns of the ledger (`dpo.runs.ledger.LEDGER_SCHEMA`), a row per pair.
    """
    if not len(rows):
        return []
    measure = _group_measure(rows)
    return [measure("all", "pairs", np.ones(len(rows), dtype=bool)), *(measure(*each) for each in _split_pairs(rows))]


def _group_measure(rows: pa.Table) -> Callable[[str, str, _Mask], PairGroup]:
    """Return the function that measures the pairs of a mask."""
    right = _is_higher(rows, "reward")
    losses = rows["loss"].to_numpy().astype(np.float64)
    longer = (np.sign(_tokens_longer(rows)) + 1) / 2
    by_reference = None if rows["reference_chosen_logp"].null_count else _is_higher(rows, "logp", "reference_")

    def measure(by: str, name: str, mask: _Mask) -> PairGroup:
        reference = None if by_reference is None else GroupValue.of_mean(by_reference[mask])
        accuracy, loss, length = (GroupValue.of_mean(values[mask]) for values in (right, losses, longer))
        return PairGroup(by, name, int(mask.sum()), accuracy, loss, length, reference)

    return measure


def _is_higher(rows: pa.Table, value: str, of: str = "") -> _Mask:
    higher: _Mask = rows[f"{of}chosen_{value}"].to_numpy() > rows[f"{of}rejected_{value}"].to_numpy()
    return higher


def _tokens_longer(rows: pa.Table) -> NDArray[np.int64]:
    chosen, rejected = (rows[f"{side}_tokens"].to_numpy().astype(np.int64) for side in ("chosen", "rejected"))
    difference: NDArray[np.int64] = chosen - rejected
    return difference


def _split_pairs(rows: pa.Table) -> Iterator[tuple[str, str, _Mask]]:
    """Yield what the groups share, their names and their pairs; groups without pairs are left out."""
    subsets = rows["subset"].to_numpy()
    yield from (("subset", name, subsets == name) for name in sorted(set(subsets)))
    turns = rows["turns"].to_numpy()  # floats if some are unknown
    named = (("1", turns == 1), ("2", turns == 2), ("3-4", (turns >= 3) & (turns <= 4)), ("5+", turns >= 5))
    yield from (("turns", name, mask) for name, mask in named if mask.any())
    longer = _tokens_longer(rows)
    edges = np.unique(np.quantile(longer, np.linspace(0, 1, LENGTH_BUCKETS + 1)[1:-1], method="lower"))
    bucket = np.searchsorted(edges, longer)  # a bucket ends at its edge, which belongs to it
    for number in np.unique(bucket):
        mask = bucket == number
        yield "tokens longer", f"{longer[mask].min()} to {longer[mask].max()}", mask


def subset_means(rows: pa.Table) -> Mapping[str, float]:
    """Return loss, accuracy and margin of every subset, by metric name and subset; nothing if there is only one."""
    subsets = rows["subset"].to_numpy()
    names = sorted(set(subsets))
    margins = rows["chosen_reward"].to_numpy() - rows["rejected_reward"].to_numpy()
    values = {"loss": rows["loss"].to_numpy(), "rewards/accuracies": margins > 0, "rewards/margins": margins}
    return {
        f"{metric}/{name}": float(each[subsets == name].mean(dtype=np.float64))
        for metric, each in values.items()
        for name in (names if len(names) > 1 else ())
    }


def groups_as_json(groups: Sequence[PairGroup]) -> list[dict[str, Any]]:
    """Return the groups as JSON values, with the name of the better rule of length beside its share."""
    return [{**asdict(group), "length_baseline": group.length_baseline[0]} for group in groups]


def print_groups(groups: Sequence[PairGroup]) -> None:
    """Print a table of the groups, of 80 columns at most, and the baselines below it; nothing without groups."""
    if not groups:
        return
    right = [Column(name, justify="right", no_wrap=True) for name in ("pairs", "accuracy %", "loss", "longer", "ref.")]
    table = Table(Column("group", max_width=17, no_wrap=True), *right, box=None, padding=(0, 1, 0, 0), pad_edge=False)
    by = "all"
    for group in groups:
        if group.by != by:
            table.add_row(f"by {group.by}")
            by = group.by
        name = group.name if by == "all" else f"  {group.name}"
        reference = _percent(group.reference.value) if group.reference else "-"
        accuracy, loss = group.accuracy, group.loss
        table.add_row(
            name,
            str(group.pairs),
            _percent_interval(accuracy),
            f"{loss.value:.3f} [{loss.low:.3f}, {loss.high:.3f}]",
            _percent(group.longer.value),
            reference,
        )
    console = Console()
    console.print(table, markup=False)
    console.print(*_explanations(groups[0]), sep="\n", markup=False, highlight=False)


def _explanations(everything: PairGroup) -> Iterator[str]:
    rule, share = everything.length_baseline
    yield "[...]: 95 % bootstrap interval. longer, ref.: % of the pairs whose chosen answer"
    yield "is longer, or more likely under the reference. tokens longer: chosen - rejected."
    yield f"Baselines: the {rule} answer wins {_percent_interval(share)} %; chance {_percent(CHANCE)} %;"
    reference = everything.reference
    yield f"  the reference's log-probability {_percent_interval(reference) if reference else '-'} %."


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _percent_interval(share: GroupValue) -> str:
    return f"{_percent(share.value)} [{_percent(share.low)}, {_percent(share.high)}]"

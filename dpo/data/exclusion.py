"""Pairs that are left out by their ids, as errors, the ledger and reports print them: ``subset/split:line``."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dpo.data.audit import KEPT_VERDICT

_PAIR_ID = re.compile(r"(.+)/(train|val|test):(\d+)")


@dataclass(frozen=True)
class Exclusion:
    """The pairs that ``--data.exclude`` leaves out of every split.

    Attributes:
        ids: Ids of the pairs.
    """

    ids: frozenset[str]

    @classmethod
    def from_option(cls, option: list[str] | str | None) -> "Exclusion":
        """Read ids, or files of ids; they are separated by commas or line ends.

        Raises:
            ValueError: Something is neither an id nor a file of ids.
        """
        given = [option] if isinstance(option, str) else option or []
        texts = [Path(each).expanduser().read_text() if _is_file(each) else each for each in given]
        ids = frozenset(part.strip() for text in texts for part in re.split(r"[,\n]", text) if part.strip())
        if unknown := sorted(each for each in ids if not _PAIR_ID.fullmatch(each)):
            raise ValueError(
                "--data.exclude: expected ids of pairs, such as helpful-base/train:12, or a file of ids, got "
                f"{unknown[0]!r}."
            )
        return cls(ids)

    def marked_rows(self, table: pa.Table, split: str) -> NDArray[np.bool_]:
        """Return for every row of a store whether it is left out.

        Args:
            table: All rows of a split, as `dpo.data.store` writes them.
            split: The split.

        Raises:
            ValueError: There is no pair with one of the ids, or its row is not used anyway.
        """
        lines_by_subset: dict[str, list[int]] = {}
        for subset, part, line in (_split_id(each) for each in self.ids):
            if part == split:
                lines_by_subset.setdefault(subset, []).append(line)
        marked = np.zeros(table.num_rows, bool)
        for subset, lines in lines_by_subset.items():
            in_subset = pc.and_(pc.equal(table["subset"], subset), pc.equal(table["verdict"], KEPT_VERDICT))
            chosen = pc.and_(in_subset, pc.is_in(table["line"], pa.array(lines, pa.int64()))).to_numpy()
            if missing := set(lines) - set(table["line"].filter(chosen).to_pylist()):
                self._refuse(f"{subset}/{split}:{min(missing)}")
            marked |= chosen
        return marked

    def require_splits(self, splits: list[str]) -> None:
        """Check that all ids are of splits that exist.

        Raises:
            ValueError: One is not.
        """
        for each in sorted(self.ids):
            if _split_id(each)[1] not in splits:
                self._refuse(each)

    def _refuse(self, pair_id: str) -> None:
        raise ValueError(
            f"--data.exclude: expected ids of pairs that would be used, got {pair_id}: no row has this id, or it is "
            "refused already. Leave it out."
        )


def _split_id(pair_id: str) -> tuple[str, str, int]:
    match = _PAIR_ID.fullmatch(pair_id)
    assert match
    return match[1], match[2], int(match[3])


def _is_file(text: str) -> bool:
    return "\n" not in text and len(text) < 4096 and Path(text).expanduser().is_file()

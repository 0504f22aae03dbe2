"""Preference data by name: `HHRLHF`, and `PreferencePairs` from anywhere.

Takes where the rows are; what is done with them is `dpo.data.datamodule.PairData`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo import quickstart
from dpo.data.columns import Columns
from dpo.data.datamodule import QUICKSTART_NAME, PairData, RowNumbers, cache_folder, check_option
from dpo.data.sources import ListedFiles, SourceFile, download_dataset, find_hh_files, list_data_files, make_sources

__all__ = ["HHRLHF", "QUICKSTART_NAME", "Part", "PreferencePairs", "cache_folder"]


class HHRLHF(PairData):
    """Anthropic's hh-rlhf, or anything in its layout and text format."""

    def __init__(
        self,
        tokenizer: str = QUICKSTART_NAME,
        path: str = QUICKSTART_NAME,
        subsets: list[str] | None = None,
        **options: Any,
    ) -> None:
        """Choose what is read.

        Args:
            tokenizer: Hub id or folder of the tokenizer, as a rule the policy's.
            path: Hub id (``Anthropic/hh-rlhf``) or folder with ``<subset>/{train,test}.jsonl.gz``; ``quickstart``
                generates data that needs neither network nor file.
            subsets: Which of them, in this order; all that are there by default.
            options: See `dpo.data.datamodule.PairData`.

        Raises:
            ValueError: An option has no such value.
        """
        super().__init__(tokenizer, **options)
        unique = subsets is None or len(set(subsets)) == len(subsets) > 0
        check_option("subsets", subsets, unique, "some names, each once, or nothing for all")
        self.path, self.subsets = path, subsets

    def list_sources(self, fetch: bool) -> list[SourceFile]:
        """The files of the subsets."""
        folder = (
            quickstart_data_folder(QUICKSTART_NAME, fetch)
            if self.path == QUICKSTART_NAME
            else Path(self.path).expanduser()
        )
        if not folder.is_dir():
            folder = download_dataset(self.path, self.subsets, local_only=not fetch)
        return find_hh_files(folder, self.subsets)


def quickstart_data_folder(name: str, fetch: bool, margins: bool = False) -> Path:
    """The folder of the quickstart's data, which are made when they are fetched."""
    folder = cache_folder() / name
    if fetch:
        quickstart.write_dataset(folder, quickstart.DPO_SEED, quickstart.TRAIN_ROWS, quickstart.TEST_ROWS, margins)
    return folder


@dataclass(frozen=True)
class Part:
    """One of several data sets.

    Attributes:
        path: As of `PreferencePairs`.
        share: Its share of the training pairs, beside those of the others; for all parts or for none.
        columns: What stands where; by default as for all.
    """

    path: str
    share: float | None = None
    columns: Columns | None = None


class PreferencePairs(PairData):
    """Preference pairs of any files: prompt, chosen and rejected as text or as messages.

    JSON lines, JSON, Parquet and Arrow files, here, on the hub or behind any address that fsspec reads; these are read
    file by file where they are, and nothing but tokens is stored.
    """

    def __init__(
        self,
        tokenizer: str = QUICKSTART_NAME,
        path: dict[str, Part] | str = "",
        columns: Columns = Columns(),  # noqa: B008  # frozen
        **options: Any,
    ) -> None:
        """Choose what is read.

        Args:
            tokenizer: Hub id or folder of the tokenizer, as a rule the policy's.
            path: File, folder, pattern, address or hub id (`dpo.data.sources` has examples and says what is of the test
                split), or ``quickstart`` as of `HHRLHF`, here with margins; or several of them by a name each, mixed:
                with shares, an epoch lasts until every pair was seen, and those of parts that are smaller than their
                share are seen more than once.
            columns: What stands where.
            options: See `dpo.data.datamodule.PairData`.

        Raises:
            ValueError: An option has no such value.
        """
        super().__init__(tokenizer, **options)
        check_option("path", path, bool(path), "a file, folder, pattern, address or hub id")
        self.parts = {"pairs": Part(path)} if isinstance(path, str) else path
        shares = [part.share for part in self.parts.values()]
        sound = all(share is not None and 0 < share < float("inf") for share in shares)
        check_option("path", shares, sound or not any(shares), "a share above 0 for every part, or none for any")
        self.path, self.columns = ", ".join(part.path for part in self.parts.values()), columns

    def list_sources(self, fetch: bool) -> list[SourceFile]:
        """The files of every part."""
        return [
            source
            for name, part in self.parts.items()
            for source in make_sources(name, self._listed(part.path, fetch), part.columns or self.columns)
        ]

    def _listed(self, path: str, fetch: bool) -> ListedFiles:
        if path == QUICKSTART_NAME:
            path = str(quickstart_data_folder(f"{QUICKSTART_NAME}-margins", fetch, margins=True))
        return list_data_files(path, cache_folder() / "listings", fetch)

    def order_training_rows(self, subsets: NDArray[np.object_], rows: RowNumbers) -> RowNumbers:
        """Every pair once; or, where shares are given, as often as they say."""
        shares = [part.share for part in self.parts.values() if part.share is not None]
        if not shares:
            return rows
        parts = [rows[subsets[rows] == name] for name in self.parts]
        for name, part in zip(self.parts, parts, strict=True):
            check_option(
                f"path.{name}", self.parts[name].path, len(part) > 0, "pairs to take a share of, see the table"
            )
        return interleave_by_share(parts, shares)


def interleave_by_share(parts: Sequence[RowNumbers], shares: Sequence[float]) -> RowNumbers:
    """Rows of every part in proportion to its share, evenly interleaved.

    So many in all that every row is there: once where the part is largest beside its share, more often elsewhere.
    """
    total = max(len(part) / share for part, share in zip(parts, shares, strict=True))
    repeated = [np.resize(part, round(total * share)) for part, share in zip(parts, shares, strict=True)]
    places = np.concatenate([(np.arange(len(part)) + 0.5) / len(part) for part in repeated])
    return np.concatenate(repeated)[np.argsort(places, kind="stable")]

"""The preference data of the command line: `HHRLHF`, and `PreferencePairs` for files of any origin and layout.

They say where the rows are; `dpo.data.datamodule.PairData` does everything else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpo import quickstart
from dpo.data.columns import Columns
from dpo.data.datamodule import QUICKSTART_NAME, OnBadRow, PairData, cache_folder, check_option
from dpo.data.pair_dataset import RowNumbers
from dpo.data.sources import ListedFiles, SourceFile, download_dataset, find_hh_files, list_data_files, why_no_hh_layout
from dpo.data.tokenization import TextFormat


class HHRLHF(PairData):
    """Anthropic's hh-rlhf, or any data set in its layout and text format.

    Example:
        >>> from dpo import HHRLHF
        >>> data = HHRLHF("Anthropic/hh-rlhf", subsets=["harmless-base"], batch_size=16)
    """

    def __init__(
        self,
        path: str = QUICKSTART_NAME,
        subsets: list[str] | None = None,
        tokenizer: str | None = None,
        max_length: int = 512,
        batch_size: int = 8,
        max_tokens: int | None = 16384,
        shuffle: bool = True,
        val_fraction: float = 0.1,
        limit: int | None = None,
        format: TextFormat = "auto",
        on_bad_row: OnBadRow = "error",
        seed: int = 0,
        exclude: list[str] | str | None = None,
    ) -> None:
        """Choose what is read and how.

        Args:
            path: Hub id (``Anthropic/hh-rlhf``) or folder with ``<subset>/{train,test}.jsonl.gz``; ``quickstart``
                generates data that needs neither network nor file.
            subsets: Subsets to read, in this order. Default: all that exist.
            tokenizer: Hub id or folder of the tokenizer. Default: the tokenizer of the policy that the trainer trains.
            max_length: Maximum tokens of prompt + answer. A longer pair loses its oldest exchanges first, then the
                start of the prompt; an answer is cut only if it does not fit alone.
            batch_size: Pairs per optimizer step, over all devices and accumulated batches.
            max_tokens: Maximum tokens of one forward pass, prompts counted once. None: no limit.
            shuffle: Draw a new order of the training pairs every epoch; otherwise keep the order of the files.
            val_fraction: Share of the training rows that become the validation split. Rows with the same first human
                turn go to the same split. 0: no validation split.
            limit: Maximum number of rows to read from each file, train and test, from its start. None: all.
            format: ``hh`` keeps the text of a dialogue, ``chat`` uses the tokenizer's chat template, ``plain`` takes
                text as it stands, ``auto`` is ``chat`` if there is a template and ``hh`` otherwise.
            on_bad_row: Stop at an unreadable row (``error``), or leave it out and count it (``skip``).
            seed: Seed of the order of training pairs.
            exclude: Ids of pairs to leave out, as errors and the ledger print them (``subset/train:12``), or a file of
                ids. The other pairs keep their order, and a run may be resumed with more or fewer of them.

        Raises:
            ValueError: An option has an invalid value, or the path is for `PreferencePairs`.
        """
        super().__init__(
            tokenizer,
            max_length,
            batch_size,
            max_tokens,
            shuffle,
            val_fraction,
            limit,
            format,
            on_bad_row,
            seed,
            exclude,
        )
        check_option("path", path, isinstance(path, str | Path), "a folder or hub id")
        if reason := "" if path == QUICKSTART_NAME else why_no_hh_layout(path):
            raise ValueError(
                f"HHRLHF reads a folder or hub id of the layout <subset>/train.jsonl.gz, and {path!r} is {reason}: use "
                f"PreferencePairs({path!r}), on the command line --data PreferencePairs."
            )
        unique = subsets is None or len(set(subsets)) == len(subsets) > 0
        check_option("subsets", subsets, unique, "at least one name, each once, or null for all")
        self.path = path
        self.subsets = subsets

    def list_sources(self, fetch: bool) -> list[SourceFile]:
        """List the files of the subsets; see `PairData.list_sources`."""
        if self.path == QUICKSTART_NAME:
            folder = quickstart_data_folder(QUICKSTART_NAME, fetch)
        elif not (folder := Path(self.path).expanduser()).is_dir():
            folder = download_dataset(self.path, self.subsets, local_only=not fetch)
        return find_hh_files(folder, self.subsets)


def quickstart_data_folder(name: str, fetch: bool, margins: bool = False) -> Path:
    """Return the folder of the quickstart's data; with `fetch`, generate them first."""
    folder = cache_folder() / name
    if fetch:
        quickstart.write_dataset(folder, quickstart.DPO_SEED, quickstart.TRAIN_ROWS, quickstart.TEST_ROWS, margins)
    return folder


@dataclass(frozen=True)
class Part:
    """One of several data sets that are mixed.

    Attributes:
        path: File, folder, pattern, address or hub id, as for `PreferencePairs`.
        share: Its share of the training pairs in relation to the shares of the others; for all parts or none.
        columns: Column name for each field. Default: the columns of `PreferencePairs`.
    """

    path: str
    share: float | None = None
    columns: Columns | None = None


class PreferencePairs(PairData):
    """Preference pairs from any files: prompt, chosen and rejected as text or as messages.

    The files are JSON lines, JSON, CSV, TSV, Parquet or Arrow, on this machine, on the hub or at any address that
    fsspec reads. Remote files are read in turn, from where they are; only their tokens are stored.
    """

    def __init__(
        self,
        path: dict[str, Part]
        | str
        | Path = "",  # with a Path, jsonargparse does not read the file as an option's value
        columns: Columns = Columns(),  # noqa: B008  # frozen
        tokenizer: str | None = None,
        max_length: int = 512,
        batch_size: int = 8,
        max_tokens: int | None = 16384,
        shuffle: bool = True,
        val_fraction: float = 0.1,
        limit: int | None = None,
        format: TextFormat = "auto",
        on_bad_row: OnBadRow = "error",
        seed: int = 0,
        exclude: list[str] | str | None = None,
    ) -> None:
        """Choose what is read and how.

        Args:
            path: File, folder, pattern (``folder/*.parquet``), address (``s3://bucket/folder``), hub id
                (``owner/name``), files of one (``owner/name/data/train-*.parquet``), or ``quickstart``, which generates
                data with margins. Files with the word test in their name or folder are the test split, with validation,
                valid, val, dev or eval the validation split. Or several named parts to mix: if they have shares, an
                epoch lasts until every pair was seen, and pairs of a part that is smaller than its share are seen more
                than once.
            columns: Column name for each field.
            tokenizer: Hub id or folder of the tokenizer. Default: the tokenizer of the policy that the trainer trains.
            max_length: Maximum tokens of prompt + answer. A longer pair loses its oldest exchanges first, then the
                start of the prompt; an answer is cut only if it does not fit alone.
            batch_size: Pairs per optimizer step, over all devices and accumulated batches.
            max_tokens: Maximum tokens of one forward pass, prompts counted once. None: no limit.
            shuffle: Draw a new order of the training pairs every epoch; otherwise keep the order of the files.
            val_fraction: Share of the training rows that become the validation split, if no file is for it. Rows with
                the same first human turn go to the same split. 0: no validation split.
            limit: Maximum number of rows to read from each file, train and test, from its start. None: all.
            format: ``hh`` keeps the text of a dialogue, ``chat`` uses the tokenizer's chat template, ``plain`` takes
                text as it stands, ``auto`` is ``chat`` if there is a template and ``hh`` otherwise.
            on_bad_row: Stop at an unreadable row (``error``), or leave it out and count it (``skip``).
            seed: Seed of the order of training pairs.
            exclude: Ids of pairs to leave out, as errors and the ledger print them (``subset/train:12``), or a file of
                ids. The other pairs keep their order, and a run may be resumed with more or fewer of them.

        Raises:
            ValueError: An option has an invalid value.
        """
        super().__init__(
            tokenizer,
            max_length,
            batch_size,
            max_tokens,
            shuffle,
            val_fraction,
            limit,
            format,
            on_bad_row,
            seed,
            exclude,
        )
        known = isinstance(path, str | Path | Mapping) and bool(path)
        check_option("path", path, known, "a file, folder, pattern, address or hub id (rows in memory: write a file)")
        self.parts = {"pairs": Part(str(path))} if isinstance(path, str | Path) else path
        shares = [part.share for part in self.parts.values()]
        valid = all(share is not None and 0 < share < float("inf") for share in shares)
        check_option("path", shares, valid or not any(shares), "a share above 0 for every part, or for none")
        self.path = ", ".join(part.path for part in self.parts.values())
        self.columns = columns

    def list_sources(self, fetch: bool) -> list[SourceFile]:
        """List the files of every part; see `PairData.list_sources`."""
        return [
            SourceFile(name, split, file, part.columns or self.columns, version)
            for name, part in self.parts.items()
            for split, file, version in self._list_files(part.path, fetch)
        ]

    def _list_files(self, path: str, fetch: bool) -> ListedFiles:
        if path == QUICKSTART_NAME:
            path = str(quickstart_data_folder(f"{QUICKSTART_NAME}-margins", fetch, margins=True))
        return list_data_files(path, cache_folder() / "listings", fetch)

    def order_training_rows(self, subsets: NDArray[np.object_], rows: RowNumbers) -> RowNumbers:
        """Return every kept row once, or as often as the shares of the parts require."""
        shares = [part.share for part in self.parts.values() if part.share is not None]
        if not shares:
            return rows
        part_rows = [rows[subsets[rows] == name] for name in self.parts]
        for (name, part), own_rows in zip(self.parts.items(), part_rows, strict=True):
            check_option(f"path.{name}", part.path, len(own_rows) > 0, "files with usable pairs (see the table)")
        return interleave_by_share(part_rows, shares)


def interleave_by_share(parts: Sequence[RowNumbers], shares: Sequence[float]) -> RowNumbers:
    """Return the rows of every part in proportion to its share, evenly interleaved.

    Every row occurs: once in the part that is the largest for its share, and possibly more often in the others.
    """
    total = max(len(part) / share for part, share in zip(parts, shares, strict=True))
    repeated = [np.resize(part, round(total * share)) for part, share in zip(parts, shares, strict=True)]
    positions = np.concatenate([(np.arange(len(part)) + 0.5) / len(part) for part in repeated])
    return np.concatenate(repeated)[np.argsort(positions, kind="stable")]

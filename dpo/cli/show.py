"""The verb ``show``: a row of the data as the model sees it, with the options of data and policy that ``fit`` takes."""

import argparse
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from rich.console import Console

from dpo.cli.main import main as run_command_line
from dpo.cli.training_cli import TrainingCLI
from dpo.data import store
from dpo.data.audit import KEPT_VERDICT
from dpo.data.datamodule import PairData
from dpo.data.display import show_example
from dpo.data.sources import SPLITS

DESCRIPTION = (
    "Show a row of the data as the model sees it: prompt and answers with their control tokens, which tokens are "
    "scored, and what was cut. All other options are those of `fit`: --data.path, --model.policy, --config and so on."
)


class DataCLI(TrainingCLI):
    """Reads model and data as ``fit`` does, and uses the data instead of training."""

    def before_instantiate_classes(self) -> None:
        """Leave the folders of runs alone."""

    def instantiate_trainer(self, **_: Any) -> Any:
        """Return nothing, as nothing is trained."""

    def _run_subcommand(self, subcommand: str) -> None:
        self.datamodule.given_tokenizer = self.datamodule.given_tokenizer or self.model.policy_path
        self.datamodule.answer_sides = self.model.answer_sides
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        self.use_data()

    def use_data(self) -> None:
        """Do what is to be done with `datamodule`, whose splits are read."""
        raise NotImplementedError


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser("dpo show", description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("--row", type=int, help="number of the row, from 1, through all files of the split (the first that is used)")
    add("--split", choices=SPLITS, default="train", help="default: %(default)s")
    return parser.parse_known_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Print a row of the data.

    Args:
        arguments: ``--row N``, ``--split``, and options of ``train.py fit``.

    Raises:
        ValueError: There is no such row.
        SystemExit: The options of ``fit`` cannot be used; the message is on stderr.
    """
    options, fit_options = _parse(arguments)

    class ShowCLI(DataCLI):
        """Shows a row."""

        def use_data(self) -> None:
            """Print the row."""
            show_row(self.datamodule, options.split, options.row)

    code = run_command_line(["fit", *fit_options], ShowCLI)
    if code:
        raise SystemExit(code)


def show_row(data: PairData, split: str, number: int | None) -> None:
    """Print a row of a split, or why it is not used.

    Args:
        data: The data, with its splits read.
        split: train, val or test.
        number: Which row, from 1; None: the first that is used.

    Raises:
        ValueError: There is no such row.
    """
    table, file_split = _rows_of_split(data, split)
    if number is None:
        number = next((row for row, verdict in enumerate(table["verdict"], 1) if verdict == KEPT_VERDICT), 1)
    if not 1 <= number <= len(table):
        raise ValueError(f"--row: expected 1 to {len(table):,}, the rows of {split}, got {number}.")
    row = table[number - 1]
    name = f"{row['subset']}/{file_split}:{row['line']}"
    if row["verdict"] == KEPT_VERDICT:
        Console().print(show_example(data.encoder, row, name, data.answer_sides))
    else:
        print(f"{name} is not used: {row['verdict'].replace('_', ' ')}.")


def _rows_of_split(data: PairData, split: str) -> tuple[Dataset, str]:
    """Return the rows of a split, and the split of the files that they are from.

    Those of val may be a part of the training rows, which holds only rows that are used.
    """
    if split in data.audits_by_split:
        return store.load_split(data.store_folder, split), split
    if split in data.pairs_by_split:
        pairs = data.pairs_by_split[split]
        return pairs.table.select(pairs.row_numbers), "train"
    raise ValueError(f"--split {split}: expected a split of {data.path}, got one of no file.")

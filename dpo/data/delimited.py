"""Rows of CSV and TSV files: the first row names the columns, and every cell is text."""

import csv
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

DELIMITERS = {".csv": ",", ".csv.gz": ",", ".tsv": "\t", ".tsv.gz": "\t"}
"""What separates the cells, by the suffix of the file."""
_MESSAGES = re.compile(r"\s*\[\s*\{\s*['\"](role|content)['\"]\s*:")


class CellRow(dict[str, object]):
    """A row whose values are all text, numbers too; an empty cell is no number."""


@dataclass(frozen=True)
class DelimitedLine:
    """One row as it is in the file.

    Attributes:
        header: Names of the columns.
        cells: The cells.
        line: Number of the line on which the row begins; text in quotes may go over several.
    """

    header: list[str]
    cells: list[str]
    line: int

    def problem(self) -> str:
        """Say what is wrong with the row; empty if nothing is."""
        if len(self.cells) != len(self.header):
            return f"expected {len(self.header)} cells as in the first line, got {len(self.cells)}"
        if any(map(_MESSAGES.match, self.cells)):
            return "expected text, got messages that are written as text: give messages as JSON lines or Parquet"
        return ""


def read_delimited(raw: Any, file_name: str, delimiter: str) -> Iterator[DelimitedLine]:
    """Read the rows of a file that is open in binary mode; bytes that are no UTF-8 become half surrogates.

    Raises:
        ValueError: The quotes or the names of the columns cannot be understood, so that nobody could tell rows apart.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    text = io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header) or not all(header):
            raise ValueError(f"{file_name}, line 1: expected names of columns, each once, got {header}.")
        last = reader.line_num
        for cells in reader:
            if cells:  # an empty line is no row
                yield DelimitedLine(header, cells, last + 1)
            last = reader.line_num
    except csv.Error as error:
        raise ValueError(
            f"{file_name}, line {reader.line_num}: the quotes cannot be understood ({error}). Write a cell that has "
            'quotes, line ends or separators within quotes, and a quote within it twice (""); or use JSON lines.'
        ) from error
    finally:
        text.detach()  # the file belongs to the caller

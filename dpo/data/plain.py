"""Rows for the format ``plain``, whose text is taken as it stands: nothing is put before, between or after it.

A prompt is the only turn of its dialogue. Without a column for it, the prompt is what both answers begin with, as TRL
reads data sets of text (``extract_prompt``).
"""

from collections.abc import Callable
from typing import Any

from dpo.data.columns import Columns, PairRow, require_text
from dpo.data.dialogue import DialoguePair, Refusal, Role, Turn, Turns
from dpo.data.formats import BadLineError, Fault, RawRow


def row_parser(columns: Columns, format: str) -> Callable[[RawRow], PairRow]:
    """Return the function that reads the pair of a row for a format of text."""
    return (lambda row: _parse_row(columns, row)) if format == "plain" else columns.parse_row


def history_parser(columns: Columns, format: str) -> Callable[[RawRow], Turns | Refusal]:
    """Return the function that reads what is to be answered in a row for a format of text."""
    return (lambda row: _parse_history(columns, row)) if format == "plain" else columns.parse_history


def _parse_row(columns: Columns, row: RawRow) -> PairRow:
    return columns.parse_row_with(row, _plain_pair)


def _parse_history(columns: Columns, row: RawRow) -> Turns | Refusal:
    refusal = columns.refuse_unread(row)
    if refusal:
        return refusal
    if columns.prompt and columns.prompt in row:
        return _history(columns, row, _text(columns.prompt, row[columns.prompt]))
    columns.require(row, columns.chosen, columns.rejected)
    pair = _plain_pair(columns, row)
    return pair if isinstance(pair, Refusal) else pair.history


def _plain_pair(columns: Columns, row: RawRow) -> DialoguePair | Refusal:
    chosen, rejected = (_text(name, row[name]) for name in (columns.chosen, columns.rejected))
    if columns.prompt and columns.prompt in row:
        prompt = _text(columns.prompt, row[columns.prompt])
    else:
        both = enumerate(zip(chosen, rejected, strict=False))
        shared = next((place for place, (first, second) in both if first != second), len(chosen))
        prompt = chosen[:shared].removesuffix(" ")  # the space belongs to the first words of the answers
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    history = _history(columns, row, prompt)
    if isinstance(history, Refusal):
        return history
    if not chosen.strip() or not rejected.strip():
        return Refusal.EMPTY_ANSWER
    return Refusal.IDENTICAL_ANSWERS if chosen == rejected else DialoguePair(history, chosen, rejected)


def _history(columns: Columns, row: RawRow, prompt: str) -> Turns | Refusal:
    if not prompt:
        return Refusal.NO_HUMAN_START
    system: Any = row.get(columns.system) if columns.system else None
    rule = (Turn(Role.SYSTEM, _text(columns.system, system)),) if system else ()
    return (*rule, Turn(Role.HUMAN, prompt))


def _text(name: str, value: object) -> str:
    if isinstance(value, list):
        raise BadLineError(
            Fault.WRONG_TYPE,
            f"column {name!r}: expected text, as --data.format plain takes text as it stands, got messages, which need "
            "--data.format chat (a chat template) or hh",
        )
    return require_text(name, value)

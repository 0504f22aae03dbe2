"""Two hh-rlhf dialogues -> one `Pair` (a shared history and two answers), or the named reason why not.

Takes the text as published and gives it back unchanged: ``pair.prompt + pair.chosen`` is the chosen dialogue,
byte for byte. Knows nothing of files, tokens or models.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise

_MARKER = re.compile(r"\n\n(Human|Assistant):")


class Role(StrEnum):
    """Who speaks; the values are the words of the format."""

    HUMAN = "Human"
    ASSISTANT = "Assistant"


class Refusal(StrEnum):
    """Why a readable row is not used, in the order of the checks; a row counts under the first that holds.

    The first three are asked of the chosen dialogue, then of the rejected one.

    Attributes:
        NO_HUMAN_START: Does not begin with a human turn (text before the first marker included).
        NOT_ALTERNATING: The same speaker has two turns in a row.
        ENDS_WITH_HUMAN: The last turn is not the assistant's, so there is no answer to learn from.
        HISTORIES_DIFFER: The two dialogues differ before the last answer: not two answers to one question.
        EMPTY_ANSWER: A last answer is empty or white space only.
        IDENTICAL_ANSWERS: Both last answers are the same text: no preference.
        CONTROL_TOKEN_IN_TEXT: The text spells a control token, which the tokenizer would read as a command.
        IDENTICAL_AFTER_TRUNCATION: Both answers are the same token ids, once cut to the maximal length.
    """

    NO_HUMAN_START = "no_human_start"
    NOT_ALTERNATING = "not_alternating"
    ENDS_WITH_HUMAN = "ends_with_human"
    HISTORIES_DIFFER = "histories_differ"
    EMPTY_ANSWER = "empty_answer"
    IDENTICAL_ANSWERS = "identical_answers"
    CONTROL_TOKEN_IN_TEXT = "control_token_in_text"
    IDENTICAL_AFTER_TRUNCATION = "identical_after_truncation"


@dataclass(frozen=True)
class Turn:
    """What one speaker says: everything behind ``Human:`` or ``Assistant:``, its leading space included."""

    role: Role
    text: str

    def __str__(self) -> str:
        return f"\n\n{self.role}:{self.text}"


@dataclass(frozen=True)
class Pair:
    """One preference: the turns from the first human one to the last, and the two answers that follow."""

    history: tuple[Turn, ...]
    chosen: str
    rejected: str

    @property
    def prompt(self) -> str:
        """Everything up to and including the last ``Assistant:``."""
        return "".join(map(str, self.history)) + str(Turn(Role.ASSISTANT, ""))

    @property
    def opening(self) -> str:
        """The first human turn, without the white space around it."""
        return self.history[0].text.strip()

    def shortened(self) -> "Pair":
        """The same without the oldest exchange (a human and an assistant turn)."""
        return replace(self, history=self.history[2:])


def parse(text: str) -> tuple[Turn, ...] | Refusal:
    """Split a dialogue into its turns; joined again they are the text.

    Returns:
        The turns, at least two, in alternation, human first and assistant last; or the reason why not.
    """
    before, *parts = _MARKER.split(text)
    turns = tuple(Turn(Role(role), said) for role, said in zip(parts[::2], parts[1::2], strict=True))
    return _fault(before, turns) or turns


def _fault(before: str, turns: Sequence[Turn]) -> Refusal | None:
    if before or not turns or turns[0].role is not Role.HUMAN:
        return Refusal.NO_HUMAN_START
    if any(turn.role is following.role for turn, following in pairwise(turns)):
        return Refusal.NOT_ALTERNATING
    return None if turns[-1].role is Role.ASSISTANT else Refusal.ENDS_WITH_HUMAN


def pair(chosen: str, rejected: str) -> Pair | Refusal:
    """Parse the two sides of a row; `Refusal` says what is asked of them and in which order."""
    first, second = parse(chosen), parse(rejected)
    if isinstance(first, Refusal):
        return first
    if isinstance(second, Refusal):
        return second
    if first[:-1] != second[:-1]:
        return Refusal.HISTORIES_DIFFER
    good, bad = first[-1].text, second[-1].text
    if not good.strip() or not bad.strip():
        return Refusal.EMPTY_ANSWER
    return Refusal.IDENTICAL_ANSWERS if good == bad else Pair(first[:-1], good, bad)

"""Dialogues and preference pairs as text.

Two dialogues become one `DialoguePair`, a shared history with two answers, or a `Refusal` that says why they cannot be
used. The text of hh-rlhf is kept unchanged: ``pair.prompt_text + pair.chosen`` is the chosen dialogue, byte for byte.
"""

import re
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise

_MARKER = re.compile(r"\n\n(Human|Assistant):")


class Role(StrEnum):
    """The speaker of a turn, spelled as in hh-rlhf (which itself has no system messages)."""

    HUMAN = "Human"
    ASSISTANT = "Assistant"
    SYSTEM = "System"


TURN_MARKERS = tuple(f"\n\n{role}:" for role in (Role.HUMAN, Role.ASSISTANT))
"""The text with which a turn begins in hh-rlhf."""


class Refusal(StrEnum):
    """Why a readable row is not used.

    The reasons are checked in this order, and a row counts under the first that applies. `TOOL_MESSAGE` to
    `ENDS_WITH_HUMAN` are checked for the chosen dialogue first, then for the rejected one.

    Attributes:
        UNMARKED: The row has sampled answers, but none is marked as chosen or rejected yet.
        HAS_IMAGES: The row has images, which no format shows to the model.
        HAS_TOOLS: The row has tools that the model may call, which no format shows to it.
        TOOL_MESSAGE: A message calls a tool or is the result of one.
        NO_HUMAN_START: The dialogue does not begin with a human turn (or has text before the first marker);
            or, as plain text, there is no prompt.
        NOT_ALTERNATING: One speaker has two turns in a row, or a system message comes later than first.
        ENDS_WITH_HUMAN: The last turn is not the assistant's, so there is no answer to learn from.
        HISTORIES_DIFFER: The dialogues differ before the last answer, or do not contain the prompt of the row.
        EMPTY_ANSWER: One of the answers is empty or white space.
        IDENTICAL_ANSWERS: Both answers are the same text.
        SYSTEM_WITHOUT_TEMPLATE: The dialogue has a system message, but no chat template can render it.
        CONTROL_TOKEN_IN_TEXT: The text contains a control token, which the tokenizer would read as a command, or,
            without a chat template, a turn marker. Of plain text, an answer has an end token before its end.
        IDENTICAL_AFTER_TRUNCATION: Both answers have the same token ids once they are cut to the maximum length.
    """

    UNMARKED = "unmarked"
    HAS_IMAGES = "has_images"
    HAS_TOOLS = "has_tools"
    TOOL_MESSAGE = "tool_message"
    NO_HUMAN_START = "no_human_start"
    NOT_ALTERNATING = "not_alternating"
    ENDS_WITH_HUMAN = "ends_with_human"
    HISTORIES_DIFFER = "histories_differ"
    EMPTY_ANSWER = "empty_answer"
    IDENTICAL_ANSWERS = "identical_answers"
    SYSTEM_WITHOUT_TEMPLATE = "system_without_template"
    CONTROL_TOKEN_IN_TEXT = "control_token_in_text"
    IDENTICAL_AFTER_TRUNCATION = "identical_after_truncation"


@dataclass(frozen=True)
class Turn:
    """One turn of a dialogue.

    Attributes:
        role: The speaker.
        text: Everything after ``Human:`` or ``Assistant:``, the leading space included.
    """

    role: Role
    text: str

    def __str__(self) -> str:
        return f"\n\n{self.role}:{self.text}"


Turns = tuple[Turn, ...]


@dataclass(frozen=True)
class DialoguePair:
    """A preference pair.

    Attributes:
        history: The turns up to and including the last human one; it begins with an optional system message and then
            a human turn.
        chosen: Text of the preferred answer.
        rejected: Text of the other answer.
    """

    history: Turns
    chosen: str
    rejected: str

    @property
    def prompt_text(self) -> str:
        """The text up to and including the last ``Assistant:``."""
        return "".join(map(str, self.history)) + str(Turn(Role.ASSISTANT, ""))

    @property
    def system_turns(self) -> Turns:
        """The system message as a tuple of one turn, or an empty tuple."""
        return self.history[:1] if self.history[0].role is Role.SYSTEM else ()

    @property
    def opening_text(self) -> str:
        """The first human turn, stripped of white space."""
        return self.history[len(self.system_turns)].text.strip()

    @property
    def exchange_count(self) -> int:
        """Number of exchanges (a human and an assistant turn) before the last human turn."""
        return (len(self.history) - len(self.system_turns)) // 2

    def without_oldest_exchange(self) -> "DialoguePair":
        """Return the pair without its oldest exchange; a system message stays."""
        return replace(self, history=self.system_turns + self.history[len(self.system_turns) + 2 :])


def parse_dialogue(text: str) -> Turns | Refusal:
    """Split the text of a dialogue in the format of hh-rlhf into its turns.

    Returns:
        At least two alternating turns, human first and assistant last, which joined are `text` again; otherwise the
        reason why the dialogue cannot be used.
    """
    before, *parts = _MARKER.split(text)
    turns = tuple(Turn(Role(role), said) for role, said in zip(parts[::2], parts[1::2], strict=True))
    return Refusal.NO_HUMAN_START if before else validate_turns(turns)


def validate_turns(turns: Turns) -> Turns | Refusal:
    """Return the turns if they are a dialogue that ends with an answer, otherwise the reason why not."""
    spoken = turns[1:] if turns and turns[0].role is Role.SYSTEM else turns
    if not spoken or spoken[0].role is not Role.HUMAN:
        return Refusal.NO_HUMAN_START
    if any(second.role in (first.role, Role.SYSTEM) for first, second in pairwise(spoken)):
        return Refusal.NOT_ALTERNATING
    return turns if spoken[-1].role is Role.ASSISTANT else Refusal.ENDS_WITH_HUMAN


def parse_pair(chosen: str, rejected: str) -> DialoguePair | Refusal:
    """Return the pair of two dialogues in the format of hh-rlhf, or the reason why they cannot be used."""
    return pair_dialogues(parse_dialogue(chosen), parse_dialogue(rejected))


def pair_dialogues(chosen: Turns | Refusal, rejected: Turns | Refusal) -> DialoguePair | Refusal:
    """Return the pair of two validated dialogues, or the reason why they cannot be used (see `Refusal`)."""
    if isinstance(chosen, Refusal):
        return chosen
    if isinstance(rejected, Refusal):
        return rejected
    if chosen[:-1] != rejected[:-1]:
        return Refusal.HISTORIES_DIFFER
    pair = DialoguePair(chosen[:-1], chosen[-1].text, rejected[-1].text)
    if not pair.chosen.strip() or not pair.rejected.strip():
        return Refusal.EMPTY_ANSWER
    return Refusal.IDENTICAL_ANSWERS if pair.chosen == pair.rejected else pair

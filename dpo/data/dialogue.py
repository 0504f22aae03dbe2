"""Two dialogues -> one `Pair` (a shared history and two answers), or the named reason why not.

Takes hh-rlhf's text as published and gives it back unchanged (``pair.prompt + pair.chosen`` is the chosen dialogue,
byte for byte), or turns that come from elsewhere. Knows nothing of files, tokens or models.
"""

import re
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise

_MARKER = re.compile(r"\n\n(Human|Assistant):")


class Role(StrEnum):
    """Who speaks; the values are the words of the format, which has no system messages."""

    HUMAN = "Human"
    ASSISTANT = "Assistant"
    SYSTEM = "System"


TURN_MARKERS = tuple(f"\n\n{role}:" for role in (Role.HUMAN, Role.ASSISTANT))
"""What begins a turn in hh-rlhf's text."""


class Refusal(StrEnum):
    """Why a readable row is not used, in the order of the checks; a row counts under the first that holds.

    The second to the fifth are asked of the chosen dialogue, then of the rejected one.

    Attributes:
        UNMARKED: Answers were sampled, and none of them is marked as the chosen and the rejected one.
        TOOL_MESSAGE: A tool is called or answers, which no dialogue of two can show.
        NO_HUMAN_START: Does not begin with a human turn (text before the first marker included).
        NOT_ALTERNATING: The same speaker has two turns in a row, or a system message stands inside.
        ENDS_WITH_HUMAN: The last turn is not the assistant's, so there is no answer to learn from.
        HISTORIES_DIFFER: The two dialogues differ before the last answer (not two answers to one question), or the
            prompt that is given besides is not part of them.
        EMPTY_ANSWER: A last answer is empty or white space only.
        IDENTICAL_ANSWERS: Both last answers are the same text: no preference.
        SYSTEM_WITHOUT_TEMPLATE: It begins with a system message, and there is no chat template with a place for one.
        CONTROL_TOKEN_IN_TEXT: The text spells a control token, which the tokenizer would read as a command; or, where
            no template is used, what begins a turn.
        IDENTICAL_AFTER_TRUNCATION: Both answers are the same token ids, once cut to the maximal length.
    """

    UNMARKED = "unmarked"
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
    """What one speaker says: everything behind ``Human:`` or ``Assistant:``, its leading space included."""

    role: Role
    text: str

    def __str__(self) -> str:
        return f"\n\n{self.role}:{self.text}"


Turns = tuple[Turn, ...]


@dataclass(frozen=True)
class DialoguePair:
    """One preference: the turns up to the last human one, and the two answers that follow.

    The first turn is human, or a system message before that.
    """

    history: Turns
    chosen: str
    rejected: str

    @property
    def prompt_text(self) -> str:
        """Everything up to and including the last ``Assistant:``."""
        return "".join(map(str, self.history)) + str(Turn(Role.ASSISTANT, ""))

    @property
    def system_turns(self) -> Turns:
        """The system message, or nothing."""
        return self.history[:1] if self.history[0].role is Role.SYSTEM else ()

    @property
    def opening_text(self) -> str:
        """The first human turn, without the white space around it."""
        return self.history[len(self.system_turns)].text.strip()

    @property
    def exchange_count(self) -> int:
        """How many stand before the last human turn."""
        return (len(self.history) - len(self.system_turns)) // 2

    def without_oldest_exchange(self) -> "DialoguePair":
        """The same without the oldest exchange (a human and an assistant turn)."""
        return replace(self, history=self.system_turns + self.history[len(self.system_turns) + 2 :])


def parse_dialogue(text: str) -> Turns | Refusal:
    """Split a dialogue into its turns; joined again they are the text.

    Returns:
        The turns, at least two, in alternation, human first and assistant last; or the reason why not.
    """
    before, *parts = _MARKER.split(text)
    turns = tuple(Turn(Role(role), said) for role, said in zip(parts[::2], parts[1::2], strict=True))
    return Refusal.NO_HUMAN_START if before else validate_turns(turns)


def validate_turns(turns: Turns) -> Turns | Refusal:
    """The turns as they are, or why they are no dialogue that an answer ends."""
    spoken = turns[1:] if turns and turns[0].role is Role.SYSTEM else turns
    if not spoken or spoken[0].role is not Role.HUMAN:
        return Refusal.NO_HUMAN_START
    if any(second.role in (first.role, Role.SYSTEM) for first, second in pairwise(spoken)):
        return Refusal.NOT_ALTERNATING
    return turns if spoken[-1].role is Role.ASSISTANT else Refusal.ENDS_WITH_HUMAN


def parse_pair(chosen: str, rejected: str) -> DialoguePair | Refusal:
    """Parse the two sides of a row; `Refusal` says what is asked of them and in which order."""
    return pair_dialogues(parse_dialogue(chosen), parse_dialogue(rejected))


def pair_dialogues(chosen: Turns | Refusal, rejected: Turns | Refusal) -> DialoguePair | Refusal:
    """Two dialogues that are `checked` -> their last answers to what both share."""
    if isinstance(chosen, Refusal):
        return chosen
    if isinstance(rejected, Refusal):
        return rejected
    if chosen[:-1] != rejected[:-1]:
        return Refusal.HISTORIES_DIFFER
    good, bad = chosen[-1].text, rejected[-1].text
    if not good.strip() or not bad.strip():
        return Refusal.EMPTY_ANSWER
    return Refusal.IDENTICAL_ANSWERS if good == bad else DialoguePair(chosen[:-1], good, bad)

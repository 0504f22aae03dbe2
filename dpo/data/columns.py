r"""Conversion of the fields of a row to a preference pair with its weight and margin.

Answers are text or messages; the prompt has a column of its own or is the beginning of both answers. Text that begins
with ``\n\nHuman:`` is a dialogue of hh-rlhf and is kept byte for byte. Any other text and every message is one turn and
is stripped of white space.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

from dpo.data.delimited import CellRow
from dpo.data.dialogue import (
    TURN_MARKERS,
    DialoguePair,
    Refusal,
    Role,
    Turn,
    Turns,
    pair_dialogues,
    parse_dialogue,
    validate_turns,
)
from dpo.data.formats import BadLineError, Fault, RawRow

HUMAN_MARKER, ASSISTANT_MARKER = TURN_MARKERS
_ROLES = {"user": Role.HUMAN, "assistant": Role.ASSISTANT, "system": Role.SYSTEM}
_TOOL_ROLES = ("tool", "function")
_CALL_FIELDS = ("tool_calls", "function_call")


@dataclass(frozen=True)
class PairRow:
    """A readable row of preference data.

    Attributes:
        pair: The pair, or why it is not used.
        weight: Factor of the loss of the pair.
        margin: By how much the chosen answer is better; None if the data have no margins.
    """

    pair: DialoguePair | Refusal
    weight: float = 1.0
    margin: float | None = None


PairParser = Callable[["Columns", RawRow], DialoguePair | Refusal]
"""Reads the two answers of a row and what they answer; may raise `BadLineError`."""


@dataclass(frozen=True)
class Columns:
    """The column name of each field; an empty name means that the data have no such field, whatever columns exist.

    Only `chosen` and `rejected` must exist in the data, and every column whose name is not the default.

    Attributes:
        prompt: What is answered, as text or messages. Without this column both answers are whole dialogues, as text of
            hh-rlhf or as messages.
        chosen: The better answer, or the whole dialogue that ends with it.
        rejected: The worse answer, or the whole dialogue that ends with it.
        system: A system message that comes before everything else.
        weight: Factor of the loss of the pair, a number of 0 or more.
        margin: By how much the chosen answer is better, a number; for losses that take a margin.
    """

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    system: str = "system"
    weight: str = "weight"
    margin: str = "margin"

    def parse_row(self, raw_row: RawRow) -> PairRow:
        """Return the preference pair of a row.

        Raises:
            BadLineError: A column is missing or has a wrong type.
        """
        return self.parse_row_with(raw_row, Columns._pair)

    def parse_row_with(self, raw_row: RawRow, pair_of: "PairParser") -> PairRow:
        """Return the pair that a function reads from a row, with its weight and margin.

        Raises:
            BadLineError: A column is missing or has a wrong type.
        """
        self.require(raw_row, self.chosen, self.rejected)
        if raw_row[self.chosen] is raw_row[self.rejected] is None:
            return PairRow(Refusal.UNMARKED)
        pair = self.refuse_unread(raw_row) or pair_of(self, raw_row)
        weight = _number(raw_row, self.weight, 0)
        margin = _number(raw_row, self.margin, -math.inf)
        return PairRow(pair, 1.0 if weight is None else weight, margin)

    def _pair(self, raw_row: RawRow) -> DialoguePair | Refusal:
        prompt = self._prompt(raw_row)
        system = self._system(raw_row)
        chosen, rejected = (self._dialogue(raw_row, name, prompt, system) for name in (self.chosen, self.rejected))
        return pair_dialogues(chosen, rejected)

    def parse_history(self, raw_row: RawRow) -> Turns | Refusal:
        """Return the turns to be answered: the prompt, or the chosen dialogue without its last answer.

        Raises:
            BadLineError: A column is missing or has a wrong type.
        """
        if refusal := self.refuse_unread(raw_row):
            return refusal
        if self.prompt not in raw_row:
            self.require(raw_row, self.chosen)
        prompt = self._prompt(raw_row)
        system = self._system(raw_row)
        if isinstance(prompt, Refusal):
            return prompt
        empty = (Turn(Role.ASSISTANT, ""),)
        turns = validate_turns(system + prompt + empty) if prompt else self._dialogue(raw_row, self.chosen, (), system)
        return turns if isinstance(turns, Refusal) else turns[:-1]

    def refuse_unread(self, raw_row: RawRow) -> Refusal | None:
        """Refuse a row with images or tools, which the model would have to see and no format shows it."""
        fields_by_refusal = {Refusal.HAS_IMAGES: ("images", "image"), Refusal.HAS_TOOLS: ("tools",)}
        unread = {refusal for refusal, names in fields_by_refusal.items() if any(map(raw_row.get, names))}
        return min(unread, default=None)

    def require(self, raw_row: RawRow, *names: str) -> None:
        """Check that these columns exist, and all that have another name than by default.

        Raises:
            BadLineError: A column is missing.
        """
        field_of = {getattr(self, field.name): field.name for field in fields(self)}
        renamed = [name for name, field in field_of.items() if name not in ("", field)]
        for name in (*names, *renamed):
            if name not in raw_row:
                option = f"--data.columns.{field_of.get(name, name)}"
                cure = f"{option} names it" if name in renamed else f"if it has another name: {option} <name>"
                expected = ", ".join(filter(None, (self.prompt, self.chosen, self.rejected)))
                raise BadLineError(
                    Fault.MISSING_FIELD,
                    f"no column {name!r}: expected {expected}, found {', '.join(sorted(raw_row)) or 'none'} ({cure})",
                )

    def _system(self, raw_row: RawRow) -> Turns:
        text = raw_row.get(self.system) if self.system else ""
        return (_turn(self.system, Role.SYSTEM, text),) if text else ()

    def _prompt(self, raw_row: RawRow) -> Turns | Refusal:
        """Return the turns of the prompt; none if there is no such column."""
        if not self.prompt or self.prompt not in raw_row:
            return ()
        value = raw_row[self.prompt]
        if not isinstance(value, str) or not value.startswith(HUMAN_MARKER):
            return _turns(self.prompt, value, Role.HUMAN)
        turns = parse_dialogue(require_text(self.prompt, value).removesuffix(ASSISTANT_MARKER) + ASSISTANT_MARKER)
        return turns if isinstance(turns, Refusal) else turns[:-1]

    def _dialogue(self, raw_row: RawRow, name: str, prompt: Turns | Refusal, system: Turns) -> Turns | Refusal:
        """Return the whole dialogue that the answer in column `name` ends."""
        turns = _turns(name, raw_row[name], Role.ASSISTANT)
        if isinstance(prompt, Refusal):
            return prompt
        if isinstance(turns, Refusal):
            return turns
        if turns[0].role is Role.ASSISTANT:
            if not prompt and self.prompt:
                self.require(raw_row, self.prompt)
            turns = prompt + turns
        elif not _contains(turns[:-1], prompt):
            return Refusal.HISTORIES_DIFFER
        return validate_turns(turns if turns[0].role is Role.SYSTEM else system + turns)


def hh_prompt_text(turns: Turns) -> str:
    """Return the text of the turns up to where the answer begins, in the format of hh-rlhf."""
    return "".join(map(str, turns)) + ASSISTANT_MARKER


def chat_messages(turns: Turns) -> list[dict[str, str]]:
    """Return the turns as messages with ``role`` and ``content``."""
    names = {role: name for name, role in _ROLES.items()}
    return [{"role": names[turn.role], "content": turn.text.strip()} for turn in turns]


def _turns(name: str, value: object, role: Role) -> Turns | Refusal:
    """Return the turns of a value of column `name`; text that is no dialogue is one turn of `role`."""
    if isinstance(value, str):
        return (
            parse_dialogue(require_text(name, value)) if value.startswith(HUMAN_MARKER) else (_turn(name, role, value),)
        )
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise BadLineError(Fault.WRONG_TYPE, f"column {name!r}: expected text or messages, got {str(value)[:40]!r}")
    if any(message.get("role") in _TOOL_ROLES or any(map(message.get, _CALL_FIELDS)) for message in value):
        return Refusal.TOOL_MESSAGE
    if any(map(_has_image, value)):
        return Refusal.HAS_IMAGES
    return tuple(_message_turn(name, message) for message in value)


def _has_image(message: dict[str, Any]) -> bool:
    parts = message.get("content")
    return isinstance(parts, list) and any("image" in str(dict(part).get("type")) for part in parts)


def _message_turn(name: str, message: dict[str, Any]) -> Turn:
    role = message.get("role")
    if role not in _ROLES:
        raise BadLineError(
            Fault.WRONG_TYPE, f"column {name!r}: expected messages with the role {' or '.join(_ROLES)}, got {role!r}"
        )
    return _turn(name, _ROLES[role], message.get("content"))


def _turn(name: str, role: Role, value: object) -> Turn:
    return Turn(role, f" {require_text(name, value).strip()}")


def require_text(name: str, value: object) -> str:
    """Return the value of column `name`, which must be text.

    Raises:
        BadLineError: It is something else, or has half a character.
    """
    if not isinstance(value, str):
        raise BadLineError(Fault.WRONG_TYPE, f"column {name!r}: expected text, got {str(value)[:40]!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which is not a character
        raise BadLineError(Fault.INVALID_UTF8, str(error)) from error
    return value


def _contains(turns: Turns, part: Turns) -> bool:
    """Return whether `part` is a contiguous part of the turns, apart from white space."""
    whole, wanted = ([(turn.role, turn.text.strip()) for turn in side] for side in (turns, part))
    return any(whole[i : i + len(wanted)] == wanted for i in range(len(whole) - len(wanted) + 1))


def _number(raw_row: RawRow, name: str, minimum: float) -> float | None:
    """Return the value of an optional column; None if there is no such column."""
    if not name or name not in raw_row:
        return None
    value = raw_row[name]
    if isinstance(raw_row, CellRow):
        if not value.strip():
            return None
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value < math.inf:
        expected = "a number of 0 or more" if minimum == 0 else "a finite number"
        raise BadLineError(Fault.WRONG_TYPE, f"column {name!r}: expected {expected}, got {value!r}")
    return float(value)

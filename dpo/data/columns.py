r"""The fields of a row -> a `Pair` with its weight and margin, or what is wrong with the row.

Takes text or messages, with the prompt in a column of its own or at the beginning of both answers. Text that begins
with ``\n\nHuman:`` is a dialogue of hh-rlhf and is kept to the byte; any other text and every message is one turn,
without the white space around it. Knows nothing of files or tokens.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

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
_TOOLS = ("tool", "function")
_CALLS = ("tool_calls", "function_call")


@dataclass(frozen=True)
class PairRow:
    """A readable row.

    Attributes:
        line: Where it stands, from 1.
        pair: What it says, or why it is not used.
        weight: By what the loss of the pair is multiplied.
        margin: By how much the chosen answer is better; None where the data do not say.
    """

    line: int
    pair: DialoguePair | Refusal
    weight: float = 1.0
    margin: float | None = None


@dataclass(frozen=True)
class Columns:
    """In which column what stands; an empty name: in none, whatever is there.

    All but `chosen` and `rejected` may be missing from the data, unless a name other than the default is given here.

    Attributes:
        prompt: What is answered: text, or messages. Without it both answers are whole dialogues: text of hh-rlhf, or
            messages.
        chosen: The better answer, or the whole dialogue with it at its end.
        rejected: The other one.
        system: A system message before everything.
        weight: A number, 0 or more, by which the loss of the pair is multiplied.
        margin: A number: by how much the chosen answer is better, for losses that take a margin.
    """

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    system: str = "system"
    weight: str = "weight"
    margin: str = "margin"

    def parse_row(self, line: int, raw_row: RawRow) -> PairRow:
        """Read a row.

        Raises:
            BadLineError: A column is missing, or holds something else than it should.
        """
        self._require(raw_row, self.chosen, self.rejected)
        if raw_row[self.chosen] is raw_row[self.rejected] is None:
            return PairRow(line, Refusal.UNMARKED)
        given, system = self._prompt(raw_row), self._system(raw_row)
        chosen, rejected = (self._side(raw_row, name, given, system) for name in (self.chosen, self.rejected))
        weight, margin = _number(raw_row, self.weight, 0), _number(raw_row, self.margin, -math.inf)
        return PairRow(line, pair_dialogues(chosen, rejected), 1.0 if weight is None else weight, margin)

    def parse_history(self, raw_row: RawRow) -> Turns | Refusal:
        """What is to be answered: the prompt, or the chosen dialogue without its last answer.

        Raises:
            BadLineError: A column is missing, or holds something else than it should.
        """
        if self.prompt not in raw_row:
            self._require(raw_row, self.chosen)
        given, system = self._prompt(raw_row), self._system(raw_row)
        if isinstance(given, Refusal):
            return given
        empty = (Turn(Role.ASSISTANT, ""),)
        whole = validate_turns(system + given + empty) if given else self._side(raw_row, self.chosen, given, system)
        return whole if isinstance(whole, Refusal) else whole[:-1]

    def _require(self, found: RawRow, *names: str) -> None:
        renamed = [value for each in fields(self) if (value := self.__dict__[each.name]) not in ("", each.default)]
        for name in (*names, *renamed):
            if name not in found:
                expected = ", ".join(filter(None, (self.prompt, self.chosen, self.rejected)))
                raise BadLineError(
                    Fault.MISSING_FIELD,
                    f"no column {name!r}: expected {expected}, found {', '.join(sorted(found)) or 'none'} "
                    "(columns of other names: --data PreferencePairs --data.columns.chosen <name> and so on)",
                )

    def _system(self, found: RawRow) -> Turns:
        text = found.get(self.system) if self.system else ""
        return (Turn(Role.SYSTEM, f" {_text(self.system, text).strip()}"),) if text else ()

    def _prompt(self, found: RawRow) -> Turns | Refusal:
        """Its turns; none where there is no such column."""
        if not self.prompt or self.prompt not in found:
            return ()
        value = found[self.prompt]
        if not isinstance(value, str) or not value.startswith(HUMAN_MARKER):
            return _said(self.prompt, value, Role.HUMAN)
        turns = parse_dialogue(_text(self.prompt, value).removesuffix(ASSISTANT_MARKER) + ASSISTANT_MARKER)
        return turns if isinstance(turns, Refusal) else turns[:-1]

    def _side(self, found: RawRow, name: str, given: Turns | Refusal, system: Turns) -> Turns | Refusal:
        """The whole dialogue that an answer ends."""
        said = _said(name, found[name], Role.ASSISTANT)
        if isinstance(given, Refusal):
            return given
        if isinstance(said, Refusal):
            return said
        if said[0].role is Role.ASSISTANT:
            if not given and self.prompt:
                self._require(found, self.prompt)
            said = given + said
        elif not _within(given, said):
            return Refusal.HISTORIES_DIFFER
        return validate_turns(said if said[0].role is Role.SYSTEM else system + said)


def hh_prompt_text(turns: Turns) -> str:
    """The dialogue up to where the answer begins, in the format of hh-rlhf."""
    return "".join(map(str, turns)) + ASSISTANT_MARKER


def chat_messages(turns: Turns) -> list[dict[str, str]]:
    """The turns as messages."""
    names = {role: name for name, role in _ROLES.items()}
    return [{"role": names[turn.role], "content": turn.text.strip()} for turn in turns]


def _said(name: str, value: object, role: Role) -> Turns | Refusal:
    """Text is what `role` says, unless it is a dialogue."""
    if isinstance(value, str):
        spoken = _text(name, value)
        return parse_dialogue(spoken) if spoken.startswith(HUMAN_MARKER) else (Turn(role, f" {spoken.strip()}"),)
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise BadLineError(Fault.WRONG_TYPE, f"column {name!r}: expected text or messages, got {str(value)[:40]!r}")
    if any(message.get("role") in _TOOLS or any(map(message.get, _CALLS)) for message in value):
        return Refusal.TOOL_MESSAGE
    return tuple(_turn(name, message) for message in value)


def _turn(name: str, message: dict[str, Any]) -> Turn:
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise BadLineError(
            Fault.WRONG_TYPE, f"column {name!r}: expected messages with the role {' or '.join(_ROLES)}, got {role!r}"
        )
    return Turn(_ROLES[role], f" {_text(name, content).strip()}")


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise BadLineError(Fault.WRONG_TYPE, f"column {name!r}: expected text, got {str(value)[:40]!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON may spell half a surrogate pair, which is no character
        raise BadLineError(Fault.INVALID_UTF8, str(error)) from error
    return value


def _within(given: Turns, said: Turns) -> bool:
    """Whether the prompt is a part of the dialogue."""
    ours, theirs = ([(turn.role, turn.text.strip()) for turn in turns] for turns in (given, said[:-1]))
    return any(theirs[i : i + len(ours)] == ours for i in range(len(theirs) - len(ours) + 1))


def _number(found: RawRow, name: str, least: float) -> float | None:
    if not name or name not in found:
        return None
    value = found[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
        wanted = "a number of 0 or more" if least == 0 else "a finite number"
        raise BadLineError(Fault.WRONG_TYPE, f"column {name!r}: expected {wanted}, got {value!r}")
    return float(value)

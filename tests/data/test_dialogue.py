"""Dialogues and pairs: what is kept, unchanged, and what is refused."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.data.dialogue import DialoguePair, Refusal, Role, Turn, parse_dialogue, parse_pair, validate_turns
from tests.support.data import ODD, OF_MESSAGES

OF_TOKENS = {Refusal.CONTROL_TOKEN_IN_TEXT, Refusal.IDENTICAL_AFTER_TRUNCATION}

SPEAKERS = (Role.HUMAN, Role.ASSISTANT)

# Text with everything that could be mistaken for a turn marker, but without one.
said = st.lists(st.sampled_from(["\n", ":", " ", "Human", "Assistant", "Human:", "\n\nhuman:", "é🐈", "a\r\n"])).map(
    "".join
)
said = said.filter(lambda text: "\n\nHuman:" not in text and "\n\nAssistant:" not in text)


@st.composite
def dialogues(draw: st.DrawFn) -> tuple[Turn, ...]:
    exchanges = draw(st.lists(st.tuples(said, said), min_size=1, max_size=4))
    return tuple(Turn(role, text) for exchange in exchanges for role, text in zip(SPEAKERS, exchange, strict=True))


@given(dialogues())
def test_parsing_joined_turns_returns_the_turns(turns: tuple[Turn, ...]) -> None:
    assert parse_dialogue("".join(map(str, turns))) == turns


@given(st.lists(st.sampled_from(["\n\nHuman:", "\n\nAssistant:", "\n", " ", "Human:", "x"])).map("".join))
def test_a_text_is_refused_or_preserved_byte_for_byte(text: str) -> None:
    turns = parse_dialogue(text)
    if isinstance(turns, Refusal):
        return
    assert "".join(map(str, turns)) == text
    assert [turn.role for turn in turns] == [Role.HUMAN, Role.ASSISTANT] * (len(turns) // 2)


@given(dialogues(), said)
def test_prompt_plus_answer_is_the_dialogue(turns: tuple[Turn, ...], other: str) -> None:
    chosen = "".join(map(str, turns))
    rejected = "".join(map(str, turns[:-1])) + str(Turn(Role.ASSISTANT, other))
    found = parse_pair(chosen, rejected)
    if isinstance(found, Refusal):
        assert found in {Refusal.EMPTY_ANSWER, Refusal.IDENTICAL_ANSWERS}
        return
    assert found.prompt_text + found.chosen == chosen
    assert found.prompt_text + found.rejected == rejected
    assert found.prompt_text.endswith("\n\nAssistant:")


@pytest.mark.parametrize("row", ODD, ids=lambda row: row["expect"])
def test_every_odd_row_has_its_expected_reason(row: dict[str, str]) -> None:
    found = parse_pair(row["chosen"], row["rejected"])
    if row["expect"] in {"kept", *OF_TOKENS}:
        assert isinstance(found, DialoguePair)
    else:
        assert found == row["expect"]


def test_the_odd_rows_have_every_reason_once() -> None:
    reasons = Counter(row["expect"] for row in ODD)
    assert {reason: reasons[reason] for reason in Refusal} == {reason: reason not in OF_MESSAGES for reason in Refusal}


def test_the_first_reason_counts_and_the_chosen_side_is_checked_first() -> None:
    human_twice, no_human = "\n\nHuman: a\n\nHuman: b", "\n\nAssistant: a"
    assert parse_pair(human_twice, no_human) == Refusal.NOT_ALTERNATING  # although it also ends with a human turn
    assert parse_pair(no_human, human_twice) == Refusal.NO_HUMAN_START
    assert parse_pair("\n\nHuman: a\n\nAssistant: ", "\n\nHuman: b\n\nAssistant: ") == Refusal.HISTORIES_DIFFER
    assert parse_pair("\n\nHuman: a\n\nAssistant:", "\n\nHuman: a\n\nAssistant:") == Refusal.EMPTY_ANSWER


def test_opening_text_and_dropping_the_oldest_exchange() -> None:
    turns = "\n\nHuman: one \n\nAssistant: two\n\nHuman: three\n\nAssistant:"
    found = parse_pair(turns + " four", turns + " five")
    assert isinstance(found, DialoguePair)
    assert found.opening_text == "one"
    assert found.without_oldest_exchange().prompt_text == "\n\nHuman: three\n\nAssistant:"
    assert (found.without_oldest_exchange().chosen, found.without_oldest_exchange().rejected) == (" four", " five")


def test_a_system_message_stays_when_exchanges_are_dropped() -> None:
    system, *turns = (Turn(role, f" {i}") for i, role in enumerate([Role.SYSTEM, *SPEAKERS, Role.HUMAN]))
    found = DialoguePair((system, *turns), " yes", " no")
    assert (found.system_turns, found.opening_text, found.exchange_count) == ((system,), "1", 1)
    assert found.without_oldest_exchange().history == (system, turns[-1])
    assert found.without_oldest_exchange().exchange_count == 0


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        ("S", Refusal.NO_HUMAN_START),
        ("SA", Refusal.NO_HUMAN_START),
        ("HSA", Refusal.NOT_ALTERNATING),
        ("SSHA", Refusal.NO_HUMAN_START),
        ("SHAH", Refusal.ENDS_WITH_HUMAN),
    ],
)
def test_a_system_message_is_allowed_only_at_the_beginning(roles: str, reason: Refusal) -> None:
    words = {role.value[0]: role for role in Role}
    assert validate_turns(tuple(Turn(words[letter], " a") for letter in roles)) == reason
    turns = tuple(Turn(words[letter], " a") for letter in "SHA")
    assert validate_turns(turns) == turns


def test_real_rows_are_preserved_byte_for_byte(hh_rlhf: Path) -> None:
    kept = 0
    for file in sorted(hh_rlhf.glob("*/*.jsonl.gz")):
        for row in map(json.loads, gzip.decompress(file.read_bytes()).split(b"\n")[:-1]):
            found = parse_pair(row["chosen"], row["rejected"])
            if isinstance(found, DialoguePair):
                assert (found.prompt_text + found.chosen, found.prompt_text + found.rejected) == (
                    row["chosen"],
                    row["rejected"],
                )
                kept += 1
    assert kept > 0

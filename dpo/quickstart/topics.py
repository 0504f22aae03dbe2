"""What the generated conversations are about and how they are worded, read from `words.json`.

A topic is a table from each thing asked about (`x`) to the right answer (`y`). Phrases are the sentences around facts:
how people ask, and how polite, evasive and rude answers begin and end. A phrase carries the space that separates it
from its neighbour and may contain `{name}` for the topic's name; the empty phrase is listed twice, so that saying
nothing is more common than any one phrase. Rows are drawn by position: a new order changes them. All text is ASCII.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Topic:
    """One table of facts and the ways to ask for them and to state them.

    Attributes:
        name: What the topic is called inside a sentence ("I know little about {name}.").
        questions: Full questions with `{x}`, understandable as the first turn.
        followups: Short questions with `{x}`, understandable only after a turn on the same topic.
        answers: Statements with `{x}` and `{y}`, short and long ones.
        facts: The right `y` for every `x`.
    """

    name: str
    questions: list[str]
    followups: list[str]
    answers: list[str]
    facts: Mapping[str, str]

    @cached_property
    def wrong_answers(self) -> Mapping[str, str]:
        """The usual wrong `y` for every `x`: the next one in the table that is not right."""
        ring = [*self.facts.values()] * 2
        numbered = enumerate(self.facts.items(), start=1)
        return {x: next(y for y in ring[after:] if y != right) for after, (x, right) in numbered}


_WORDS = json.loads((Path(__file__).parent / "words.json").read_text(encoding="utf-8"))
PHRASES: Mapping[str, list[str]] = _WORDS["phrases"]
TOPICS: tuple[Topic, ...] = tuple(Topic(**topic) for topic in _WORDS["topics"])

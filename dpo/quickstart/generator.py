"""Preference rows drawn from a seed, in exactly the text format and file layout of hh-rlhf.

The last answers are of four kinds: helpful (polite and right), evasive, wrong (polite, with a common mistake) and
rude. Helpful beats all others and evasive beats rude; the margin is 2 between helpful and rude and 1 elsewhere. So the
chosen answer is, as in real preference data, better but not always good: a model that imitates chosen answers is
evasive two times in five, and only the comparison shows what is wanted. Whether the longer answer wins is a fair coin.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from random import Random

from dpo.files import write_atomically
from dpo.quickstart.topics import PHRASES, TOPICS, Topic

SUBSET_NAME = "quickstart"
"""Name of the only subset, and so of the folder that `write_dataset` makes."""

_PIECE = re.compile(r"\w+|[^\w\s]")
_HELD_OUT_ONE_IN = 8  # one opening in eight belongs to the test part, for every seed


def _helpful(random: Random, topic: Topic, x: str) -> str:
    return _polite(random, topic, x, topic.facts[x])


def _wrong(random: Random, topic: Topic, x: str) -> str:
    return _polite(random, topic, x, topic.wrong_answers[x])


def _polite(random: Random, topic: Topic, x: str, y: str) -> str:
    statement = random.choice(topic.answers).format(x=x, y=y)
    sentence = statement[0].upper() + statement[1:]
    return random.choice(PHRASES["polite_leads"]) + sentence + random.choice(PHRASES["polite_closes"])


def _evasive(random: Random, topic: Topic, x: str) -> str:
    text = random.choice(PHRASES["evasions"]) + random.choice(PHRASES["evasion_closes"])
    return text.format(name=topic.name)


def _rude(random: Random, topic: Topic, x: str) -> str:
    text = random.choice(PHRASES["rebuffs"]) + random.choice(PHRASES["rebuff_closes"])
    return text.format(name=topic.name)


AnswerFunction = Callable[[Random, Topic, str], str]

# (chosen, rejected, margin) and how often: three chosen answers in five are helpful, two evasive
_LEVELS: tuple[tuple[tuple[AnswerFunction, AnswerFunction, float], float], ...] = (
    ((_helpful, _evasive, 1.0), 0.30),
    ((_helpful, _wrong, 1.0), 0.25),
    ((_helpful, _rude, 2.0), 0.05),
    ((_evasive, _rude, 1.0), 0.40),
)
_PAIRS, _WEIGHTS = zip(*_LEVELS, strict=True)


def _longer(one: str, other: str) -> bool:
    """Return whether `one` is longer in characters and in words and marks, roughly what a tokenizer counts."""
    return len(one) > len(other) and len(_PIECE.findall(one)) > len(_PIECE.findall(other))


def _answers(random: Random, topic: Topic, x: str) -> tuple[str, str, float]:
    """Draw a chosen and a rejected answer and their margin, again until the one that a coin picked is longer."""
    better, worse, margin = random.choices(_PAIRS, _WEIGHTS)[0]
    longer_wins = random.random() < 0.5
    while True:
        chosen = better(random, topic, x)
        rejected = worse(random, topic, x)
        if _longer(chosen, rejected) if longer_wins else _longer(rejected, chosen):
            return chosen, rejected, margin


def _opening(random: Random, topic: Topic, x: str) -> str:
    question = random.choice(topic.questions).format(x=x)
    return random.choice(PHRASES["greetings"]) + question + random.choice(PHRASES["reasons"])


def _next_turn(random: Random, topic: Topic) -> tuple[Topic, str, str]:
    """Draw topic, thing and question of the next turn: mostly a short question on the same topic."""
    if random.random() < 0.6:
        x = random.choice(list(topic.facts))
        return topic, x, random.choice(topic.followups).format(x=x)
    topic = random.choice(TOPICS)
    x = random.choice(list(topic.facts))
    return topic, x, random.choice(topic.questions).format(x=x)


def _row(random: Random) -> tuple[str, str, str, float]:
    """Draw the opening, the chosen dialogue, the rejected dialogue and the margin of one row."""
    topic = random.choice(TOPICS)
    x = random.choice(list(topic.facts))
    opening = question = _opening(random, topic, x)
    shared = ""
    for _ in range(random.choices((0, 1, 2), (0.6, 0.3, 0.1))[0]):
        earlier = random.choice((_helpful, _evasive))(random, topic, x)
        shared += f"\n\nHuman: {question}\n\nAssistant: {earlier}"
        topic, x, question = _next_turn(random, topic)
    shared += f"\n\nHuman: {question}\n\nAssistant: "
    chosen, rejected, margin = _answers(random, topic, x)
    return opening, shared + chosen, shared + rejected, margin


def is_held_out(opening: str) -> bool:
    """Return whether dialogues with this first human turn belong to the test part; it is the same for every seed."""
    return hashlib.sha256(opening.encode()).digest()[0] % _HELD_OUT_ONE_IN == 0


def _stream(seed: int, held_out: bool) -> Iterator[tuple[str, str, float]]:
    random = Random(seed)
    while True:
        opening, chosen, rejected, margin = _row(random)
        if is_held_out(opening) == held_out:
            yield chosen, rejected, margin


def draw_rows(seed: int, n: int, held_out: bool = False) -> Iterator[tuple[str, str]]:
    r"""Draw preference rows; the same seed gives the same rows, and a larger `n` continues a smaller one.

    Args:
        seed: Seed of Python's own random generator.
        n: Number of rows.
        held_out: Draw the test part instead of the train part. The two never share a first human turn, whatever the
            seeds, so a model trained on any train part has not seen the openings of any test part.

    Yields:
        (chosen, rejected): two dialogues of the form "\n\nHuman: ...\n\nAssistant: ...", with one to three human
        turns, that share every turn but the last answer.
    """
    return ((chosen, rejected) for chosen, rejected, _ in islice(_stream(seed, held_out), n))


def _write_gzip(path: Path, lines: Iterable[str]) -> None:
    with (
        write_atomically(path) as temporary,
        temporary.open("wb") as raw,
        # Without name and time in the header, the same rows give the same bytes.
        gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file,
    ):
        file.writelines(f"{line}\n".encode() for line in lines)


def write_dataset(folder: Path, seed: int, train_rows: int, test_rows: int, margins: bool = False) -> Path:
    """Write a data set in hh-rlhf's layout: `<folder>/quickstart/{train,test}.jsonl.gz`.

    Args:
        folder: Folder to write to, made if needed. A file of an earlier call is replaced as a whole.
        seed: Seed of the draw.
        train_rows: Rows of the train part.
        test_rows: Rows of the test part.
        margins: Write a third column, `margin`.

    Returns:
        `folder`, which can be read as a local copy of hh-rlhf with the single subset `SUBSET_NAME`.
    """
    subset = folder / SUBSET_NAME
    subset.mkdir(parents=True, exist_ok=True)
    columns = ("chosen", "rejected", "margin")[: 3 if margins else 2]
    for part, n, held_out in (("train", train_rows, False), ("test", test_rows, True)):
        rows = islice(_stream(seed, held_out), n)
        _write_gzip(subset / f"{part}.jsonl.gz", (json.dumps(dict(zip(columns, row, strict=False))) for row in rows))
    return folder

"""Preference rows from a seed, in exactly the text format and file layout of hh-rlhf.

Takes a seed and a number of rows; gives pairs of full dialogues (chosen, rejected), or a folder that reads
like a copy of the data set. It does not know tokens or models.

The last answers are of four kinds: helpful (polite and right), evasive, wrong (polite, with a usual mistake) and
rude. Helpful beats all others, evasive beats rude; the margin is 2 between helpful and rude and 1 elsewhere. So the
chosen answer is, as in real preference data, better but not always good: a model that imitates chosen answers is
evasive two times in five, and only the comparison shows what is wanted. Whether the longer answer wins is a fair coin.
"""

import gzip
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from random import Random

from dpo.quickstart import phrases
from dpo.quickstart.topics import TOPICS, Topic

SUBSET_NAME = "quickstart"
"""Name of the only subset, and so of the folder that `write` makes."""

_PIECE = re.compile(r"\w+|[^\w\s]")
_HELD_OUT_PART = 8  # one opening in eight belongs to the test part, for every seed


def _helpful(random: Random, topic: Topic, x: str) -> str:
    return _polite(random, topic, x, topic.facts[x])


def _wrong(random: Random, topic: Topic, x: str) -> str:
    return _polite(random, topic, x, topic.wrong_answers[x])


def _polite(random: Random, topic: Topic, x: str, y: str) -> str:
    core = random.choice(topic.answers).format(x=x, y=y)
    sentence = core[0].upper() + core[1:]
    return random.choice(phrases.POLITE_LEADS) + sentence + random.choice(phrases.POLITE_CLOSES)


def _evasive(random: Random, topic: Topic, x: str) -> str:
    text = random.choice(phrases.EVASIONS) + random.choice(phrases.EVASION_CLOSES)
    return text.format(name=topic.name)


def _rude(random: Random, topic: Topic, x: str) -> str:
    text = random.choice(phrases.REBUFFS) + random.choice(phrases.REBUFF_CLOSES)
    return text.format(name=topic.name)


AnswerFunction = Callable[[Random, Topic, str], str]

# (chosen, rejected, by how much it is better) and how often: three chosen answers in five are helpful, two evasive
_LEVELS: tuple[tuple[tuple[AnswerFunction, AnswerFunction, float], float], ...] = (
    ((_helpful, _evasive, 1.0), 0.30),
    ((_helpful, _wrong, 1.0), 0.25),
    ((_helpful, _rude, 2.0), 0.05),
    ((_evasive, _rude, 1.0), 0.40),
)
_PAIRS, _WEIGHTS = zip(*_LEVELS, strict=True)


def _longer(one: str, other: str) -> bool:
    """Whether the one text is longer both in characters and in words and marks, about what a tokenizer counts."""
    return len(one) > len(other) and len(_PIECE.findall(one)) > len(_PIECE.findall(other))


def _answers(random: Random, topic: Topic, x: str) -> tuple[str, str, float]:
    """A chosen and a rejected answer and their margin; a coin says which is longer, and they are drawn until it is."""
    (better, worse, margin), longer_wins = random.choices(_PAIRS, _WEIGHTS)[0], random.random() < 0.5
    while True:
        chosen, rejected = better(random, topic, x), worse(random, topic, x)
        if _longer(chosen, rejected) if longer_wins else _longer(rejected, chosen):
            return chosen, rejected, margin


def _opening(random: Random, topic: Topic, x: str) -> str:
    question = random.choice(topic.questions).format(x=x)
    return random.choice(phrases.GREETINGS) + question + random.choice(phrases.REASONS)


def _next(random: Random, topic: Topic) -> tuple[Topic, str, str]:
    """The next turn's topic, thing and question: mostly the same topic, asked shortly."""
    if random.random() < 0.6:
        x = random.choice(list(topic.facts))
        return topic, x, random.choice(topic.followups).format(x=x)
    topic = random.choice(TOPICS)
    x = random.choice(list(topic.facts))
    return topic, x, random.choice(topic.questions).format(x=x)


def _row(random: Random) -> tuple[str, str, str, float]:
    """The opening, the chosen dialogue, the rejected dialogue and the margin."""
    topic = random.choice(TOPICS)
    x = random.choice(list(topic.facts))
    opening = question = _opening(random, topic, x)
    shared = ""
    for _ in range(random.choices((0, 1, 2), (0.6, 0.3, 0.1))[0]):
        earlier = random.choice((_helpful, _evasive))(random, topic, x)
        shared += f"\n\nHuman: {question}\n\nAssistant: {earlier}"
        topic, x, question = _next(random, topic)
    shared += f"\n\nHuman: {question}\n\nAssistant: "
    chosen, rejected, margin = _answers(random, topic, x)
    return opening, shared + chosen, shared + rejected, margin


def is_held_out(opening: str) -> bool:
    """Whether dialogues with this first human turn belong to the test part. The same for every seed."""
    return hashlib.sha256(opening.encode()).digest()[0] % _HELD_OUT_PART == 0


def _stream(seed: int, held_out: bool) -> Iterator[tuple[str, str, float]]:
    random = Random(seed)
    while True:
        opening, chosen, rejected, margin = _row(random)
        if is_held_out(opening) == held_out:
            yield chosen, rejected, margin


def draw_rows(seed: int, n: int, held_out: bool = False) -> Iterator[tuple[str, str]]:
    r"""Draws preference rows; the same seed gives the same rows, and more of them continue the fewer.

    Args:
        seed: of Python's own random generator.
        n: number of rows.
        held_out: the test part rather than the train part. The two never share a first human turn, whatever
            the seeds, so a model trained on any train part has not seen the openings of any test part.

    Yields:
        (chosen, rejected): two dialogues of the form "\n\nHuman: ...\n\nAssistant: ...", with one to three
        human turns, that share every turn but the last answer.
    """
    return ((chosen, rejected) for chosen, rejected, _ in islice(_stream(seed, held_out), n))


def _write_gzip(path: Path, lines: Iterable[str]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # other runs may be writing the same
    # name and time stay out of the header, so that the same rows are the same bytes
    with partial.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
        file.writelines(f"{line}\n".encode() for line in lines)
    os.replace(partial, path)


def write_dataset(folder: Path, seed: int, train_rows: int, test_rows: int, margins: bool = False) -> Path:
    """Writes a data set in hh-rlhf's layout: `<folder>/quickstart/{train,test}.jsonl.gz`.

    Args:
        folder: made if needed; files of an earlier call are replaced, each as a whole.
        seed: of the draw.
        train: rows of the train part.
        test: rows of the test part.
        margins: write a third column, `margin`.

    Returns:
        `folder`, ready to be read as a local copy of hh-rlhf with the one subset `SUBSET`.
    """
    subset = folder / SUBSET_NAME
    subset.mkdir(parents=True, exist_ok=True)
    for name, n, held_out in (("train", train_rows, False), ("test", test_rows, True)):
        names = ("chosen", "rejected", "margin")[: 3 if margins else 2]
        found = islice(_stream(seed, held_out), n)
        lines = (json.dumps(dict(zip(names, row, strict=False))) for row in found)
        _write_gzip(subset / f"{name}.jsonl.gz", lines)
    return folder

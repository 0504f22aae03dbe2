"""What the generated conversations are about.

Takes nothing; gives `TOPICS`. It does not know how rows are drawn, nor which of two answers is preferred.
Every topic is a table from a thing asked about (`x`) to the right answer (`y`). All text is plain ASCII.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Topic:
    """One table of facts and the ways to ask for and to state them.

    Attributes:
        name: what the topic is called inside a sentence ("I know little about {name}.").
        questions: full questions, with `{x}`; understandable as the first turn.
        followups: short questions, with `{x}`; understandable only after a turn on the same topic.
        answers: statements with `{x}` and `{y}`, short and long ones.
        facts: the right `y` for every `x`.
    """

    name: str
    questions: tuple[str, ...]
    followups: tuple[str, ...]
    answers: tuple[str, ...]
    facts: Mapping[str, str]

    @cached_property
    def wrong_answers(self) -> Mapping[str, str]:
        """The usual wrong `y` for every `x`: the next one in the table that is not right."""
        ring = [*self.facts.values()] * 2
        numbered = enumerate(self.facts.items(), start=1)
        return {x: next(y for y in ring[after:] if y != right) for after, (x, right) in numbered}


def _lines(text: str) -> tuple[str, ...]:
    """One entry a line."""
    return tuple(line.strip() for line in text.strip().splitlines())


def _table(text: str) -> dict[str, str]:
    """Reads `x=y` entries separated by semicolons."""
    return dict(entry.strip().split("=") for entry in text.split(";"))


def _successors(names: str) -> dict[str, str]:
    """Each name's next one, round and round."""
    ring = names.split()
    return dict(zip(ring, ring[1:] + ring[:1], strict=True))


TOPICS: tuple[Topic, ...] = (
    Topic(
        "capitals",
        _lines("""
            What is the capital of {x}?
            Which city is the capital of {x}?
            Can you name the capital of {x}?
            I want to know the capital of {x}.
        """),
        ("And of {x}?", "What about {x}?", "And the capital of {x}?"),
        _lines("""
            It is {y}.
            The capital of {x} is {y}.
            {y} is the capital of {x}.
            The city that you are looking for is {y}, the capital of {x}.
        """),
        _table("""
            France=Paris; Italy=Rome; Spain=Madrid; Germany=Berlin; England=London; Japan=Tokyo; Egypt=Cairo;
            Greece=Athens; Norway=Oslo; Austria=Vienna; Peru=Lima; Russia=Moscow
        """),
    ),
    Topic(
        "sums",
        ("What is {x}?", "How much is {x}?", "Can you work out {x}?", "I need the result of {x}."),
        ("And {x}?", "How about {x}?", "And how much is {x}?"),
        _lines("""
            It is {y}.
            {x} is {y}.
            The result of {x} is {y}.
            If you add the two numbers in {x}, you get {y}.
        """),
        {f"{a} + {b}": str(a + b) for a in range(1, 6) for b in range(1, 6)},
    ),
    Topic(
        "opposites",
        _lines("""
            What is the opposite of {x}?
            Which word is the opposite of {x}?
            Can you tell me the opposite of {x}?
            I am looking for the opposite of {x}.
        """),
        ("And of {x}?", "What about {x}?", "And the opposite of {x}?"),
        _lines("""
            It is {y}.
            The opposite of {x} is {y}.
            You can say {y}.
            The word that means just the opposite of {x} is {y}.
        """),
        _table("""
            hot=cold; big=small; fast=slow; up=down; day=night; old=young; rich=poor; light=dark; early=late;
            full=empty; wet=dry; left=right
        """),
    ),
    Topic(
        "animals",
        _lines("""
            What does {x} say?
            What sound does {x} make?
            Which noise do you hear from {x}?
            My child wants to know what {x} says.
        """),
        ("And {x}?", "What about {x}?", "And what does {x} say?"),
        _lines("""
            It says {y}.
            You would hear {y} from {x}.
            The sound of {x} is {y}.
            If you meet {x} on a farm or in the woods, you will hear {y}.
        """),
        _table("""
            a cow=moo; a dog=woof; a cat=meow; a duck=quack; a sheep=baa; a pig=oink; a lion=roar;
            a snake=hiss; a bee=buzz; a frog=croak; a horse=neigh; an owl=hoot
        """),
    ),
    Topic(
        "colours",
        _lines("""
            What colour is {x}?
            Which colour does {x} have?
            Can you tell me the colour of {x}?
            I would like to paint {x}. Which colour do I need?
        """),
        ("And {x}?", "What about {x}?", "And the colour of {x}?"),
        _lines("""
            It is {y}.
            The colour of {x} is {y}.
            You need {y} for {x}.
            Most people would say that {x} is {y}, and they are right.
        """),
        _table("""
            the sky=blue; grass=green; snow=white; coal=black; a lemon=yellow; a tomato=red; a carrot=orange;
            chocolate=brown; a plum=purple; the sea=blue; a leaf=green; milk=white
        """),
    ),
    Topic(
        "the calendar",
        _lines("""
            What comes after {x}?
            Which name follows {x}?
            Can you tell me what comes right after {x}?
            I forgot what follows {x}.
        """),
        ("And after {x}?", "What about {x}?", "And what follows {x}?"),
        _lines("""
            It is {y}.
            After {x} comes {y}.
            {y} follows {x}.
            If you look at the calendar, you will see that {y} comes right after {x}.
        """),
        _successors("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
        | _successors("January February March April May June July August September October November December"),
    ),
    Topic(
        "young animals",
        _lines("""
            What do you call a young {x}?
            What is the name of a baby {x}?
            Which word is used for a young {x}?
            I saw a baby {x}. What is it called?
        """),
        ("And a {x}?", "What about a {x}?", "And a young {x}?"),
        _lines("""
            It is a {y}.
            A young {x} is a {y}.
            The word for a baby {x} is {y}.
            People who know about animals call a young {x} a {y}.
        """),
        _table("""
            dog=puppy; cat=kitten; cow=calf; sheep=lamb; horse=foal; pig=piglet; duck=duckling; hen=chick;
            lion=cub; deer=fawn; goat=kid; frog=tadpole
        """),
    ),
    Topic(
        "jobs",
        _lines("""
            What does a {x} do?
            What is the work of a {x}?
            Can you tell me what a {x} does?
            My friend is a {x}. What does that mean?
        """),
        ("And a {x}?", "What about a {x}?", "And what does a {x} do?"),
        _lines("""
            The job is to {y}.
            A {x} has to {y}.
            To {y} is the work of a {x}.
            Somebody who works as a {x} is there to {y}.
        """),
        _table("""
            baker=bake bread; teacher=teach pupils; doctor=heal people; farmer=grow food; pilot=fly planes;
            painter=paint walls; singer=sing songs; tailor=sew clothes; cook=make meals; plumber=repair pipes;
            sailor=sail ships; writer=write books
        """),
    ),
    Topic(
        "household tasks",
        (
            "How do I {x}?",
            "What is the best way to {x}?",
            "Can you explain how to {x}?",
            "I would like to {x}.",
        ),
        ("And how do I {x}?", "What if I want to {x}?", "And to {x}?"),
        ("Just {y}.", "To {x}, {y}.", "First of all, {y}.", "If you want to {x}, it is best to {y}."),
        _table("""
            make tea=pour hot water on the leaves; boil an egg=put it in hot water for six minutes;
            clean a window=wipe the glass with a wet cloth; wash a shirt=use warm water and soap;
            grow tomatoes=plant the seeds in a sunny place; sleep better=go to bed at the same time each day;
            cook rice=heat one cup with two cups of water; make toast=put the bread in the toaster;
            save money=write down what you spend; learn a song=sing one line at a time;
            wrap a gift=fold paper around the box; stay warm=wear a thick coat
        """),
    ),
    Topic(
        "feelings",
        (
            "I feel {x} today.",
            "I am {x}. What can I do?",
            "Lately I am often {x}.",
            "What helps when one feels {x}?",
        ),
        ("And if I am {x}?", "What about feeling {x}?", "And when I feel {x}?"),
        _lines("""
            Try to {y}.
            When you feel {x}, it helps to {y}.
            Many people who are {x} like to {y}.
            Thank you for telling me that you are {x}, and perhaps you could {y}.
        """),
        _table("""
            sad=talk to a good friend; tired=rest for a while; bored=start a new hobby;
            nervous=breathe slowly; hungry=eat a snack; thirsty=drink some water;
            lonely=call your family; angry=count to ten; cold=put on a warm coat; proud=share your good news;
            curious=read a book; stressed=do one thing at a time
        """),
    ),
)

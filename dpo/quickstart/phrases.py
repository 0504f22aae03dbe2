"""The sentences around facts: how people ask, and how polite, evasive and rude answers are worded.

Takes nothing; gives tuples of phrases, some with `{name}` for the topic's name. A phrase carries the space
that parts it from its neighbour. It does not know which answers are preferred. All text is plain ASCII.
"""

_NOTHING = ("", "")  # twice, so that going without is more common than any one phrase

GREETINGS: tuple[str, ...] = (
    *_NOTHING,
    "Hi! ",
    "Hello there. ",
    "Good morning! ",
    "Quick question. ",
    "Excuse me. ",
    "Please help me. ",
)
REASONS: tuple[str, ...] = (
    *_NOTHING,
    " Thank you!",
    " Please be brief.",
    " It is for a quiz.",
    " My son asked me.",
    " I cannot remember.",
    " We talk about it at school.",
    " A friend wants to know.",
)

POLITE_LEADS: tuple[str, ...] = (
    *_NOTHING,
    "Sure! ",
    "Of course. ",
    "Good question! ",
    "Happy to help. ",
    "Gladly. ",
    "With pleasure. ",
)
POLITE_CLOSES: tuple[str, ...] = (
    *_NOTHING,
    " I hope that helps!",
    " Have a nice day!",
    " Let me know if you need more.",
    " Please ask me again any time.",
)

EVASIONS: tuple[str, ...] = (
    "I am not sure.",
    "I am not sure about that.",
    "I cannot say much about {name}.",
    "I would rather not say.",
    "I know little about {name}, to be honest.",
    "I think that this depends on many things.",
    "I could say something about {name}, but not much.",
    "Some say this and some say that.",
)
EVASION_CLOSES: tuple[str, ...] = (
    *_NOTHING,
    " Maybe look it up.",
    " You could ask somebody else.",
    " There may be a book about {name}.",
    " Perhaps another time.",
)

REBUFFS: tuple[str, ...] = (
    "That is your problem.",
    "What a silly thing to ask.",
    "I have better things to do.",
    "Why would anybody care about {name}?",
    "Stop bothering me with {name}.",
    "Everybody but you knows that.",
    "Find it out by yourself and leave me alone.",
    "You never listen, so why should I talk about {name} now?",
)
REBUFF_CLOSES: tuple[str, ...] = (
    *_NOTHING,
    " Go away.",
    " I am tired of you.",
    " Do not ask me again.",
    " That is so boring.",
)

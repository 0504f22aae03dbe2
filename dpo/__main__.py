"""`python -m dpo <verb>`: the home of everything that is neither training nor serving.

A verb is a function that takes the words behind the verb. It raises ValueError or OSError for what its user
can put right: the program ends with that message and exit code 1.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

VERBS = {  # verb: its function, imported only when it is asked for, and what it does
    "demo": ("dpo.cli.shipped:make_run", "Make the shipped run again, which serve.py --demo serves."),
    "losses": ("dpo.losses.table:main", "Print every loss: formula, parameters, source, values on three known pairs."),
    "push": ("dpo.runs.hub:main", "Upload a run's export to the Hugging Face hub."),
    "quickstart": ("dpo.cli.shipped:make_policy", "Make the shipped quickstart policy again from nothing."),
}


def usage_text() -> str:
    """One line for each verb."""
    lines = [f"  {name:<10} {help}" for name, (_, help) in VERBS.items()]
    return "\n".join(["usage: python -m dpo <verb> ... (each verb has --help)", "", *lines])


def main(arguments: Sequence[str]) -> int:
    """Run the verb that `arguments` begins with.

    Returns:
        Exit code: 0 done, 1 refused with a message, 2 not understood, 130 interrupted.
    """
    if not arguments or arguments[0] not in VERBS:
        asked = arguments[:1] in (["-h"], ["--help"])
        print(usage_text(), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        module, _, function = VERBS[arguments[0]][0].partition(":")
        getattr(import_module(module), function)(arguments[1:])
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

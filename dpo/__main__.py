"""`python -m dpo <verb>`: the home of everything that is neither training nor serving.

A verb is a function that takes the words behind it; the first line of its docstring is its help. It raises
ValueError or OSError for what its user can put right: the program ends with that message and exit code 1.
"""

import sys
from collections.abc import Callable, Sequence

from dpo import hub

VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "push": hub.main,
}


def usage() -> str:
    """One line for each verb."""
    lines = [f"  {name:<10} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    return "\n".join(["usage: python -m dpo <verb> ... (each verb has --help)", "", *lines])


def main(arguments: Sequence[str]) -> int:
    """Run the verb that `arguments` begins with.

    Returns:
        Exit code: 0 done, 1 refused with a message, 2 not understood, 130 interrupted.
    """
    if not arguments or arguments[0] not in VERBS:
        asked = arguments[:1] in (["-h"], ["--help"])
        print(usage(), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        VERBS[arguments[0]](arguments[1:])
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

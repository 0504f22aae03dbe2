"""The command ``dpo <verb>``, also ``python -m dpo <verb>``; ``train.py`` and ``serve.py`` are shorter ways to some.

A verb raises ValueError or OSError for what its user can put right: the program ends with the message and exit code 1.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper

from dpo.files import describe_os_error
from dpo.runs.signals import exit_on_signals
from dpo.secrets import conceal

# Waiting threads sleep; spinning, they would take the cores of everything else. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TRAINING_VERBS = {  # of `dpo.cli.main`, which returns exit codes of its own
    "fit": "Train a policy.",
    "validate": "Measure a checkpoint on the validation pairs.",
    "test": "Measure a checkpoint on the test pairs.",
    "predict": "Write log-probabilities and rewards of pairs, or answers to prompts.",
}
VERBS = {  # verb: its function, imported only when it is asked for, and what it does
    "compare": ("dpo.cli.compare:main", "Print a table of runs: the options that differ between them, and results."),
    "demo": ("dpo.cli.shipped:make_run", "Make the shipped run again, which serve.py --demo serves."),
    "doctor": ("dpo.cli.doctor:main", "Say what of this machine would stop or slow a long run."),
    "evaluate": ("dpo.cli.evaluate:main", "Measure a policy on reward benchmarks, beside its reference and length."),
    "from-trl": ("dpo.cli.from_trl:main", "Convert a DPO configuration of TRL, LLaMA-Factory or Axolotl."),
    "losses": ("dpo.losses.table:main", "Print every loss: formula, parameters, source, values on three known pairs."),
    "plan": ("dpo.cli.plan:main", "Say what a fit needs before its model is downloaded: memory, what fits, time."),
    "push": ("dpo.runs.hub:main", "Upload a run's export to the Hugging Face hub."),
    "quickstart": ("dpo.cli.shipped:make_policy", "Make the shipped quickstart policy again from nothing."),
    "report": ("dpo.cli.report:main", "Write what a run has learned as one page: a verdict in words, and pictures."),
    "serve": ("dpo.cli.serve:main", "Serve a trained policy beside its reference: a page and an API."),
    "show": ("dpo.cli.show:main", "Show a row of the data as the model sees it, with the tokens that are scored."),
    "verify-resume": ("dpo.cli.verify_resume:main", "Prove that stop and resume equal no stop, on your own options."),
}


def usage_text() -> str:
    """Return the usage, one line for each verb."""
    helps = TRAINING_VERBS | {verb: text for verb, (_, text) in VERBS.items()}
    lines = [f"  {verb:<13} {text}" for verb, text in helps.items()]
    return "\n".join(["usage: dpo <verb> ... (each verb has --help)", "", *lines])


def announce_start() -> None:
    """Say on a terminal that something happens: importing torch and the rest takes seconds."""
    if sys.stderr.isatty():
        print("Starting ...", file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    """Run the verb that the arguments begin with.

    Returns:
        Exit code: 0 done, 1 refused with a message, 2 not understood, 130 interrupted.
    """
    if arguments[:1] and arguments[0] in TRAINING_VERBS:
        announce_start()
        code: int = import_module("dpo.cli.main").main(arguments)
        return code
    if not arguments or arguments[0] not in VERBS:
        asked = arguments[:1] in (["-h"], ["--help"])
        print(usage_text(), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        module, _, function = VERBS[arguments[0]][0].partition(":")
        getattr(import_module(module), function)(arguments[1:])
    except (ValueError, OSError) as error:
        text = describe_os_error(error) if isinstance(error, OSError) else str(error)
        print(f"error: {conceal(text).removeprefix('error: ')}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run() -> int:
    """Run the command line of this process; the entry point of the installed command."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # no run ends because a terminal lacks a character
    if sys.argv[1:] and sys.argv[1] in TRAINING_VERBS:
        exit_on_signals()
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(run())

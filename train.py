"""`python train.py fit | validate | test | predict`: see `--help` and `fit --print_config`."""

import sys
from io import TextIOWrapper

from dpo.__main__ import announce_start  # a module that also sets what torch reads when it is imported
from dpo.runs.signals import exit_on_signals

if __name__ == "__main__":
    exit_on_signals()
    announce_start()
    from dpo.cli.main import main

    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # no run ends because a terminal lacks a character
    sys.exit(main(sys.argv[1:]))

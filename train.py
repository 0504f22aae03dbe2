"""`python train.py fit | validate | test | predict`: see `--help` and `fit --print_config`."""

import os
import sys
from io import TextIOWrapper

# Threads that wait for work sleep; spinning, they take the cores of everything else on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

if __name__ == "__main__":
    from dpo.cli.main import main

    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # no run ends because a terminal lacks a character
    sys.exit(main(sys.argv[1:]))

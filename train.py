"""`python train.py fit | validate | test | predict`: see `--help` and `fit --print_config`."""

import sys

from dpo.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python serve.py`: serve a trained policy beside its reference, as a web page and an API; see `--help`."""

import sys

from dpo.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))

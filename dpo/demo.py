"""`python -m dpo demo`: makes the shipped run again, which `serve.py --demo` serves.

Trains the quickstart as `train.py fit` does and keeps what that leaves, but for checkpoints and what wandb notes down.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path

from dpo import quickstart
from dpo.cli import main as train
from dpo.run import complete

NAME = "quickstart"


def main(arguments: Sequence[str]) -> None:
    """Make the shipped run again.

    Raises:
        ValueError: Training did not end well.
    """
    parser = argparse.ArgumentParser("python -m dpo demo", description=__doc__)
    parser.add_argument("--to", type=Path, default=quickstart.TRAINED, help="folder to write; default: the shipped one")
    options, extra = parser.parse_known_args(arguments)
    to = options.to.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        with chdir(scratch):  # so that the configuration, which is shipped, names no folder of this machine
            code = train(["fit", "--name", NAME, *extra])
        if code:
            raise ValueError(f"training ended with exit code {code}; {to} is unchanged.")
        to.parent.mkdir(parents=True, exist_ok=True)
        with complete(to) as folder:
            left_out = shutil.ignore_patterns("checkpoints", "wandb")
            shutil.copytree(Path(scratch) / "runs" / NAME, folder, ignore=left_out)
    print(f"Quickstart run: {to}")

"""What the package ships, made again: the quickstart policy and the run that `serve.py --demo` serves.

`python -m dpo quickstart` makes the policy from nothing: draws the supervised rows from their seed, makes a tokenizer
and a random policy (`quickstart.fresh`), then runs the project's own supervised stage on the chosen answers. Nothing
is downloaded. `python -m dpo demo` trains the quickstart as `train.py fit` does and keeps what that leaves, but for
checkpoints and what wandb notes down.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path

from dpo import quickstart
from dpo.cli.main import main as train
from dpo.files import write_atomically

SFT_CONFIG = Path(__file__).parents[2] / "configs" / "quickstart_sft.yaml"
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def rebuild_policy(to: Path, extra: Sequence[str] = ()) -> None:
    """Write the policy to a folder; `extra` are further words for `train.py fit`."""
    with tempfile.TemporaryDirectory() as scratch:
        blank, rows, runs = (Path(scratch) / name for name in ("blank", "rows", "runs"))
        quickstart.write_untrained_policy(blank)
        quickstart.write_dataset(rows, quickstart.SFT_SEED, quickstart.SFT_ROWS, quickstart.TEST_ROWS)
        where = ["--trainer.default_root_dir", str(runs), "--model.policy", str(blank), "--data.path", str(rows)]
        code = train(["fit", "--config", str(SFT_CONFIG), "--name", "sft", *where, *extra])
        if code:
            raise ValueError(f"the supervised stage ended with exit code {code}; {to} is unchanged.")
        to.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(to) as folder:
            folder.mkdir()
            for source, names in ((runs / "sft" / "export", MODEL_FILES), (blank, TOKENIZER_FILES)):
                for name in names:
                    shutil.copyfile(source / name, folder / name)
    print(f"Quickstart policy: {to}")


def make_policy(arguments: Sequence[str]) -> None:
    """Make the shipped quickstart policy again from nothing."""
    parser = argparse.ArgumentParser("python -m dpo quickstart", description=make_policy.__doc__)
    parser.add_argument(
        "--to", type=Path, default=quickstart.POLICY_FOLDER, help="folder to write; default: the shipped one"
    )
    options, extra = parser.parse_known_args(arguments)
    rebuild_policy(options.to, extra)


DEMO_RUN_NAME = "quickstart"
DEMO = """Make the shipped run again, which `serve.py --demo` serves: train the quickstart as `train.py fit` does and
keep what that leaves, but for checkpoints and what wandb notes down."""


def make_run(arguments: Sequence[str]) -> None:
    """Make the shipped run again.

    Raises:
        ValueError: Training did not end well.
    """
    parser = argparse.ArgumentParser("python -m dpo demo", description=DEMO)
    parser.add_argument(
        "--to", type=Path, default=quickstart.TRAINED_RUN, help="folder to write; default: the shipped one"
    )
    options, extra = parser.parse_known_args(arguments)
    to = options.to.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        with chdir(scratch):  # so that the configuration, which is shipped, names no folder of this machine
            code = train(["fit", "--name", DEMO_RUN_NAME, *extra])
        if code:
            raise ValueError(f"training ended with exit code {code}; {to} is unchanged.")
        to.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(to) as folder:
            left_out = shutil.ignore_patterns("checkpoints", "wandb")
            shutil.copytree(Path(scratch) / "runs" / DEMO_RUN_NAME, folder, ignore=left_out)
    print(f"Quickstart run: {to}")

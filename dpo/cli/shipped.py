"""Commands that make the shipped files again: the quickstart policy, and the run that ``serve.py --demo`` serves.

``dpo quickstart`` creates the policy without downloads: it generates the supervised rows from their seed, trains a
tokenizer, initializes a random policy, and fine-tunes it on the chosen answers. ``dpo demo`` trains that policy as
``train.py fit`` does and keeps the run without its checkpoints and its wandb files.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path

from dpo import quickstart
from dpo.cli.main import main as train
from dpo.cli.parser import CONFIG_FOLDER
from dpo.files import write_atomically

SFT_CONFIG = CONFIG_FOLDER / "quickstart_sft.yaml"
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
DEMO_RUN_NAME = "quickstart"


def _parse(verb: str, description: str, default: Path, arguments: Sequence[str]) -> tuple[Path, list[str]]:
    """Return the folder to write, and the other arguments, which are options of ``train.py fit``."""
    parser = argparse.ArgumentParser(f"python -m dpo {verb}", description=description)
    parser.add_argument("--to", type=Path, default=default, help="folder to write; default: the shipped one")
    options, fit_options = parser.parse_known_args(arguments)
    return options.to.resolve(), fit_options


def _train(arguments: list[str], to: Path) -> None:
    """Train, and create the folder that the result is written into."""
    code = train(arguments)
    if code:
        raise ValueError(f"training ended with exit code {code}; {to} is unchanged.")
    to.parent.mkdir(parents=True, exist_ok=True)


def make_policy(arguments: Sequence[str]) -> None:
    """Make the shipped quickstart policy again from nothing.

    Args:
        arguments: ``--to FOLDER``, and options of ``train.py fit``.

    Raises:
        ValueError: Training failed.
    """
    description = "Make the shipped quickstart policy again from nothing."
    to, fit_options = _parse("quickstart", description, quickstart.POLICY_FOLDER, arguments)
    with tempfile.TemporaryDirectory() as scratch:
        untrained, rows, runs = (Path(scratch) / name for name in ("untrained", "rows", "runs"))
        quickstart.write_untrained_policy(untrained)
        quickstart.write_dataset(rows, quickstart.SFT_SEED, quickstart.SFT_ROWS, quickstart.TEST_ROWS)
        paths = ["--trainer.default_root_dir", str(runs), "--model.policy", str(untrained), "--data.path", str(rows)]
        _train(["fit", "--config", str(SFT_CONFIG), "--name", "sft", *paths, *fit_options], to)
        with write_atomically(to) as folder:
            folder.mkdir()
            for source, names in ((runs / "sft" / "export", MODEL_FILES), (untrained, TOKENIZER_FILES)):
                for name in names:
                    shutil.copyfile(source / name, folder / name)
    print(f"Quickstart policy: {to}")


def make_run(arguments: Sequence[str]) -> None:
    """Make the shipped run again.

    Args:
        arguments: ``--to FOLDER``, and options of ``train.py fit``.

    Raises:
        ValueError: Training failed.
    """
    description = (
        "Make the shipped run again, which `serve.py --demo` serves: train the quickstart as `train.py fit` does, and "
        "keep the run without its checkpoints and its wandb files."
    )
    to, fit_options = _parse("demo", description, quickstart.TRAINED_RUN, arguments)
    with tempfile.TemporaryDirectory() as scratch:
        with chdir(scratch):  # relative paths, so that the shipped configuration names no folder of this machine
            _train(["fit", "--name", DEMO_RUN_NAME, *fit_options], to)
        with write_atomically(to) as folder:
            ignored = shutil.ignore_patterns("checkpoints", "wandb")
            shutil.copytree(Path(scratch) / "runs" / DEMO_RUN_NAME, folder, ignore=ignored)
    print(f"Quickstart run: {to}")

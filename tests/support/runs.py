"""Small runs through the real command line, of a random policy on generated pairs."""

import csv
import gzip
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoTokenizer

from dpo import quickstart
from dpo.cli.main import main
from dpo.runs.folder import Run
from tests.support.environment import SCRATCH
from tests.support.models import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
Rows = tuple[tuple[str, str], ...]


@cache
def policy(family: str = "llama", seed: int = 0, **config: object) -> Path:
    """Return a folder with a tiny random model of one layer and the quickstart's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(quickstart.POLICY_FOLDER)
    name = "-".join([family, str(seed), *(f"{key}={value}" for key, value in config.items())])
    folder = SCRATCH / "models" / name
    tokenizer.save_pretrained(folder)
    options = {"num_hidden_layers": 1, **config}
    make_tiny_model(family, vocab_size=len(tokenizer), seed=seed, **options).save_pretrained(folder)
    return folder


@cache
def pairs(train: int = 24, test: int = 6) -> Path:
    """Return a folder of dialogues; by the default `val_fraction`, 20 of 24 training rows train and 4 are held out."""
    folder = SCRATCH / "data" / f"{train}-{test}"
    write(folder, rows(0, train), rows(train, train + test))
    return folder


def rows(first: int, end: int) -> Rows:
    """Return (chosen, rejected) dialogues of one or two turns, with answers of different lengths."""
    dialogues = []
    for i in range(first, end):
        before = f"\n\nHuman: Good day {i}!\n\nAssistant: Hello." * (i % 2)
        prompt = f"{before}\n\nHuman: How is {i}?\n\nAssistant:"
        dialogues.append(
            (prompt + " It is very good" * (1 + i % 3) + ".", prompt + " Do not ask me" * (1 + i % 2) + "!")
        )
    return tuple(dialogues)


def write(folder: Path, train: Rows, test: Rows) -> None:
    """Write (chosen, rejected) dialogues as files in the layout of hh-rlhf."""
    (folder / "pairs").mkdir(parents=True)
    for split, rows in (("train", train), ("test", test)):
        with gzip.open(folder / "pairs" / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"chosen": c, "rejected": r}) + "\n" for c, r in rows)


@dataclass(frozen=True)
class Lab:
    """A folder for runs, and the options with which every command line begins; a test may override them."""

    folder: Path

    def words(self, verb: str, *more: str) -> list[str]:
        """Return the command line of a verb."""
        base: dict[str, Any] = {
            "model.policy": policy(),
            "data.path": pairs(),
            "data.batch_size": 4,
            "data.max_length": 128,
            "trainer.default_root_dir": self.folder,
            "trainer.accelerator": "cpu",
            "trainer.enable_progress_bar": "false",
            "trainer.enable_model_summary": "false",
            "trainer.log_every_n_steps": 1,
        }
        return [verb, "--allow-import=tests", *(f"--{name}={value}" for name, value in base.items()), *more]

    def main(self, verb: str, *more: str) -> int:
        """Run a verb in this process and return its exit code."""
        return self.only(*self.words(verb, *more))

    def only(self, *words: str) -> int:
        """Run a command line without the common options and return its exit code."""
        with (
            patch.object(sys, "argv", ["train.py"]),
            patch("dpo.cli.training_cli.report_line", return_value="Report: left out"),  # pictures take a second
        ):
            return main(words)

    def fit(self, name: str, *more: str) -> Run:
        """Train a run, which must succeed."""
        assert self.main("fit", f"--name={name}", *more) == 0
        return Run(self.folder / name)

    def start(self, verb: str, *more: str, **environment: str | None) -> "subprocess.Popen[str]":
        """Start a verb in a new process; environment variables that are None are unset."""
        variables = os.environ | environment
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *self.words(verb, *more)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={name: value for name, value in variables.items() if value is not None},
            cwd=self.folder,
        )


def metrics(run: Run) -> list[dict[str, float]]:
    """Return the rows of metrics.csv without their empty cells."""
    with run.metrics_path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def checkpoint(run: Run, name: str = "last") -> dict[str, Any]:
    """Return the content of a checkpoint, read with plain torch."""
    return torch.load(run.checkpoint_folder / f"{name}.ckpt", weights_only=True)


def weights(run: Run, name: str = "last") -> dict[str, torch.Tensor]:
    """Return the weights in a checkpoint."""
    return checkpoint(run, name)["state_dict"]

"""The verb ``verify-resume``: whether stop and resume equal no stop, tried with the options of a ``fit``."""

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from dpo.callbacks.stopping import StopAfterStep
from dpo.cli.main import main as run_command_line
from dpo.cli.show import DataCLI
from dpo.data.datamodule import cache_folder
from dpo.runs.equality import PartComparison, compare_runs
from dpo.runs.folder import Run

DESCRIPTION = (
    "Prove with the options of a `fit` that a run which is stopped and resumed ends as the run that was never stopped, "
    "to the bit: train a few steps in one go; train them again with a stop in the middle and one before a validation; "
    "compare weights, optimizer, schedule, metrics, every pair of every step, samples and export. Exit code 1: they "
    "differ."
)
OWN_OPTIONS = ("--name", "--ckpt_path", "--trainer.default_root_dir", "--trainer.logger")
FEWEST_STEPS = 3  # with a step before, between and after the two stops
VALIDATION_BATCHES = 2  # of every validation, where the options do not say
SHOWN_NAMES = 3  # of values that differ
LOG_LINES = 15  # shown of a fit that failed


@dataclass(frozen=True)
class Trial:
    """A few steps of a `fit`, to be run with and without stops.

    Attributes:
        folder: Folder of the runs and of what they print.
        options: The user's options of ``fit``.
        overrides: Options that come after them.
    """

    folder: Path
    options: Sequence[str]
    overrides: Sequence[str]

    def run_in_one_go(self, name: str) -> Run:
        """Train a run without a stop."""
        self._fit(name, [])
        return Run(self.folder / name)

    def run_with_stops(self, name: str, stops: Sequence[int]) -> Run:
        """Train a run that is stopped after some steps and resumed, each time by a new process."""
        for step in stops:
            callback = {
                "class_path": f"{StopAfterStep.__module__}.{StopAfterStep.__name__}",
                "init_args": {"step": step},
            }
            self._fit(name, [f"--trainer.callbacks+={json.dumps(callback)}", "--ckpt_path=auto"])
        self._fit(name, ["--ckpt_path=auto"])
        return Run(self.folder / name)

    def _fit(self, name: str, more: Sequence[str]) -> None:
        own = [f"--name={name}", f"--trainer.default_root_dir={self.folder}", "--trainer.logger=false"]
        words = ["fit", *self.options, *self.overrides, *own, *more]
        code, printed = run_fit(words)
        if code:
            lines = "\n".join(printed.splitlines()[-LOG_LINES:])
            raise ValueError(f"`dpo {' '.join(words)}` ended with exit code {code}:\n{lines}")


def run_fit(words: Sequence[str]) -> tuple[int, str]:
    """Run a command line in a process of its own; return its exit code and what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "dpo", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser("dpo verify-resume", description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("--steps", type=int, default=6, help=f"optimizer steps, at least {FEWEST_STEPS} (default: %(default)s)")
    add("--to", type=Path, help="new folder in which the runs are kept (default: a temporary one, which is removed)")
    options, fit_options = parser.parse_known_args(arguments)
    if options.steps < FEWEST_STEPS:
        raise ValueError(f"--steps: expected at least {FEWEST_STEPS} optimizer steps, got {options.steps}.")
    if options.to is not None and options.to.exists():
        raise ValueError(f"--to: expected a new folder, and {options.to} exists. Remove it or choose another.")
    given = [word for word in fit_options if word.partition("=")[0] in OWN_OPTIONS]
    if given:
        raise ValueError(f"verify-resume sets {', '.join(OWN_OPTIONS)} itself: leave out {' and '.join(given)}.")
    return options, fit_options


def parse_fit_options(fit_options: Sequence[str]) -> Any:
    """Return the parsed options of a ``fit``, which are checked as ``fit`` checks them at first.

    Raises:
        SystemExit: The options cannot be used; the message is on stderr.
    """
    found: list[Any] = []

    class OptionsCLI(DataCLI):
        """Keeps the parsed options."""

        def _run_subcommand(self, subcommand: str) -> None:
            found.append(self.config[subcommand])

    if code := run_command_line(["fit", *fit_options], OptionsCLI):
        raise SystemExit(code)
    return found[0]


def choose_overrides(trainer: Any, steps: int, validated_step: int) -> list[str]:
    """Return the options that make a run this short and let it validate where it is to be stopped.

    Args:
        trainer: The parsed options of the trainer.
        steps: Optimizer steps of the run.
        validated_step: The step that is followed by a validation, beside the last.
    """
    batches = validated_step * (trainer.accumulate_grad_batches or 1)
    length = [f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1", "--trainer.max_time=null"]
    validations = ["--trainer.check_val_every_n_epoch=null", f"--trainer.val_check_interval={batches}"]
    limit = [f"--trainer.limit_val_batches={VALIDATION_BATCHES}"] if trainer.limit_val_batches is None else []
    return [*length, *validations, *limit]


@contextmanager
def run_folder(chosen: Path | None) -> Iterator[Path]:
    """Yield the folder that was chosen, or a temporary one, which is removed with all that is in it."""
    if chosen is not None:
        yield chosen
        return
    with TemporaryDirectory(prefix="verify-resume-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def main(arguments: Sequence[str]) -> None:
    """Compare a run with stops to one without.

    Args:
        arguments: ``--steps N``, ``--to FOLDER``, and options of ``train.py fit``.

    Raises:
        ValueError: An option is out of range, or a run failed.
        SystemExit: The runs differ, or the options of ``fit`` cannot be used.
    """
    options, fit_options = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left behind
    middle = options.steps // 2
    validated = (middle + options.steps) // 2
    overrides = choose_overrides(parse_fit_options(fit_options).trainer, options.steps, validated)
    with run_folder(options.to) as folder:
        print(f"Options beside yours: {' '.join(overrides)}")
        print(f"The runs are in {folder}, without W&B; tokens stay in {cache_folder()}, as of every fit.", flush=True)
        trial = Trial(folder.absolute(), fit_options, overrides)
        print(f"1. {options.steps} steps in one go", flush=True)
        straight = trial.run_in_one_go("straight")
        print(f"2. The same, stopped after step {middle} and before the validation after step {validated}", flush=True)
        compared = compare_runs(straight, trial.run_with_stops("resumed", (middle, validated)))
        print_run_comparison(compared)
        if not any(part.differing for part in compared):
            print("The run that was stopped and resumed equals the one that was not.")
            return
        print("3. They differ: once more in one go, to see whether the stops are to blame", flush=True)
        again = compare_runs(straight, trial.run_in_one_go("straight-again"))
    print(verdict_of_control(again))
    raise SystemExit(1)


def print_run_comparison(compared: Sequence[PartComparison]) -> None:
    """Print what was compared, the largest difference, and the first values that differ."""
    table = Table("compared", "values", "largest difference", "equal")
    for part in compared:
        table.add_row(part.part, f"{part.compared:,}", f"{part.difference:.3g}", "no" if part.differing else "yes")
    console = Console()
    console.print(table)
    for part in (part for part in compared if part.differing):
        more = f" and {len(part.differing) - SHOWN_NAMES:,} more" if len(part.differing) > SHOWN_NAMES else ""
        names = "; ".join(part.differing[:SHOWN_NAMES])
        console.print(f"Different in {part.part}: {names}{more}", markup=False, highlight=False, soft_wrap=True)


def verdict_of_control(compared: Sequence[PartComparison]) -> str:
    """Return what a second run without stops says about the difference between one with and one without."""
    differing = [part.part for part in compared if part.differing]
    if not differing:
        return (
            "Two runs without a stop are equal, so the stops are to blame: something that your options choose keeps a "
            "state, such as random numbers drawn or rows read, that is not in the checkpoint."
        )
    return (
        f"Two runs without a stop differ as well ({', '.join(differing)}), so this says nothing of the stops: the "
        "computation is not deterministic. Try --trainer.deterministic true."
    )

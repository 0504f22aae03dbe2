"""What stops, faults and saving cost: `python benchmarks/reliability.py [--chains 20] [--parts signals]`.

Prints the rows of the table in docs/reliability.md. Signals and lost processes are those of real processes that
train the quickstart on 200 rows; chains are drawn as in tests/training/test_chains.py.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

from training import ROOT, machine

sys.path.insert(0, str(ROOT))  # for the tests

from tests.support.processes import children_of, ended
from tests.support.runs import Lab
from tests.training import test_chains

FIT = ["fit", "--config", str(ROOT / "configs/quickstart.yaml"), "--data.limit", "200", "--name", "run"]
FIT += ["--data.batch_size", "8", "--trainer.val_check_interval", "5", "--trainer.enable_progress_bar", "false"]
PHASES = {
    "tokenising": ("dpo.data.store", "_table", 2),
    "reading weights": ("dpo.training.base", "Stage.configure_model", 1),
    "checks before the first step": ("dpo.training.preflight", "run_preflight", 1),
    "first step": ("dpo.training.base", "Stage.training_step", 1),
    "a later step": ("dpo.training.base", "Stage.training_step", 3),
    "validation": ("dpo.training.measuring", "MeasuredModule.validation_step", 4),
    "sampling": ("dpo.callbacks.samples", "AnswerSampler._sample", 2),
    "checkpoint": ("dpo.models.checkpoint_io", "AtomicCheckpointIO.save_checkpoint", 2),
    "export": ("dpo.runs.export", "write_policy_files", 1),
}
# Runs a command line that leaves a file when a function is called.
PROGRAM = """
import importlib, os, sys, time
from pathlib import Path
module, path, call, mark = os.environ["PHASE"].split("|")
from dpo.cli.main import main
from dpo.runs.signals import RUN_SIGNALS
owner = importlib.import_module(module)
*owners, name = path.split(".")
for each in owners:
    owner = getattr(owner, each)
function, calls, spent = getattr(owner, name), [], []
def called(*arguments, **options):
    calls.append(0)
    if len(calls) == int(call):
        Path(mark).touch()
    began = time.perf_counter()
    try:
        return function(*arguments, **options)
    finally:
        spent.append(time.perf_counter() - began)
setattr(owner, name, called)
code = main(sys.argv[1:])
print("spent", *spent)
sys.exit(code)
"""


def start(folder: Path, phase: tuple[str, str, int], *words: str) -> "subprocess.Popen[str]":
    """Start a fit with caches of its own that leaves the file `mark` in a phase."""
    module, name, call = phase
    program = folder / "program.py"  # a file, which Lightning starts again for the second process
    program.write_text(PROGRAM)
    phase_variable = f"{module}|{name}|{call}|{folder / 'mark'}"
    return subprocess.Popen(
        [sys.executable, str(program), *FIT, "--trainer.default_root_dir", str(folder / "runs"), *words],
        env=os.environ
        | {
            "DPO_CACHE": str(folder / "cache"),
            "WANDB_MODE": "disabled",
            "PYTHONPATH": str(ROOT),
            "PHASE": phase_variable,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
    )


def await_mark(folder: Path, process: "subprocess.Popen[str]") -> None:
    """Wait until the phase begins.

    Raises:
        RuntimeError: The process has ended before it.
    """
    while not (folder / "mark").exists():
        if process.poll() is not None:
            raise RuntimeError(process.communicate()[0][-2000:])
        time.sleep(0.01)


def signals(repetitions: int, phases: Sequence[str]) -> Iterator[str]:
    """Longest time from SIGTERM in a phase to the end of the process."""
    for name in phases:
        waits, codes = [], set()
        for _ in range(repetitions):
            with tempfile.TemporaryDirectory() as scratch:
                process = start(Path(scratch), PHASES[name])
                await_mark(Path(scratch), process)
                began = time.perf_counter()
                process.terminate()
                process.communicate()
                waits.append(time.perf_counter() - began)
                codes.add(process.returncode)
        yield f"| SIGTERM in: {name} | {max(waits):.1f} s, exit code {codes} | {repetitions} times |"


def losses(repetitions: int) -> Iterator[str]:
    """Longest time until all processes of two have ended once one of them is gone."""
    for number in (signal.SIGKILL, signal.SIGSTOP):
        for rank in (0, 1):
            waits = []
            for _ in range(repetitions):
                with tempfile.TemporaryDirectory() as scratch:
                    two = ["--trainer.devices", "2", "--trainer.max_epochs", "500"]
                    process = start(Path(scratch), PHASES["a later step"], *two)
                    await_mark(Path(scratch), process)
                    (child,) = children_of(process)[:1]
                    began = time.perf_counter()
                    os.kill((process.pid, child)[rank], number)
                    process.communicate()
                    assert ended(child, 60)
                    waits.append(time.perf_counter() - began)
            yield f"| {number.name} of process {rank} of 2 | all ended in {max(waits):.1f} s | {repetitions} times |"


def checkpoints(repetitions: int) -> Iterator[str]:
    """What a checkpoint costs, weights and the states of AdamW in float32."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        process = start(folder, PHASES["checkpoint"], "--checkpoint.every_n_steps", "1")
        spent = sorted(map(float, process.communicate()[0].rpartition("spent")[2].split()))
        size = (folder / "runs/run/checkpoints/last.ckpt").stat().st_size / 1e6
        yield f"| a checkpoint of {size:.1f} MB | median {spent[len(spent) // 2] * 1e3:.0f} ms | {len(spent)} saved |"


def chains(count: int) -> Iterator[str]:
    """Chains of stops, drawn at random, that did not end in the uninterrupted run."""
    draw, lost = random.Random(1), 0
    with tempfile.TemporaryDirectory() as scratch:
        lab = Lab(Path(scratch))
        whole = cache(
            lambda name: lab.fit(f"whole-{name}", *test_chains.BASE, *test_chains.VARIANTS[name], test_chains.END)
        )
        for _ in range(count):
            variant = draw.choice(sorted(test_chains.VARIANTS))
            places = sorted(draw.randint(1, test_chains.STEPS - 1) for _ in range(draw.randint(1, 3)))
            chain = [(draw.choice(["steps", *test_chains.STOPS]), place) for place in places]
            try:
                test_chains.check_chain(lab, whole, variant, chain)
            except AssertionError:
                lost += 1
                print(f"lost: {variant} {chain}", file=sys.stderr)
    yield f"| chains of one to three stops | {lost} lost | {count} drawn |"


def main(words: Sequence[str] | None = None) -> None:
    """Measure, and print each row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts: dict[str, tuple[Callable[[int], Iterator[str]], str]] = {
        "signals": (lambda count: signals(count, options.phases), "repetitions"),
        "losses": (losses, "repetitions"),
        "checkpoints": (checkpoints, "repetitions"),
        "chains": (chains, "chains"),
    }
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES), help="in which a signal is sent")
    parser.add_argument("--repetitions", type=int, default=3, help="of every signal and loss")
    parser.add_argument("--chains", type=int, default=20)
    options = parser.parse_args(words)
    load = ", ".join(f"{each:.0f}" for each in os.getloadavg())
    print(
        f"{machine('cpu')}; load {load} on {os.cpu_count()} cores\n\n| what | found | how often |\n|---|---|---|",
        flush=True,
    )
    for part in options.parts:
        measure, argument = parts[part]
        for row in measure(getattr(options, argument)):
            print(row, flush=True)


if __name__ == "__main__":
    main()

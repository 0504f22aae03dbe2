"""Two processes of which one dies, hangs or fails: all end within 60 seconds, with a message."""

import os
import signal
import time
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch

from dpo.callbacks import process_watch
from dpo.callbacks.process_watch import ProcessWatch
from dpo.runs.folder import Run
from dpo.runs.signals import StopSignals
from tests.support.processes import children_of, ended
from tests.support.runs import Lab, checkpoint, metrics, weights


def test_silence_of_a_process_ends_the_others_and_an_end_in_order_does_not() -> None:
    store, signals = torch.distributed.HashStore(), Mock(spec=StopSignals, launcher=0)
    others = [ProcessWatch(Mock(spec=StopSignals, launcher=0), 100.0) for _ in range(2)]
    watch = ProcessWatch(signals, limit=0.5)
    with patch.object(process_watch, "BEAT_INTERVAL", 0.05):
        for rank, each in enumerate([watch, *others]):
            each.begin(store, rank, 3)
        time.sleep(1)
        assert not signals.end_all.called, "all give signs of life"
        others[0].has_ended.set()
        time.sleep(1)
        assert not signals.end_all.called, "process 1 has ended in order"
        with patch.object(others[1], "has_ended", Mock(wait=lambda _: time.sleep(60))):  # process 2 hangs
            time.sleep(1)
    (message,) = signals.end_all.call_args.args
    assert message.startswith("process 2 of the run has given no sign of life")
    for each in [watch, *others]:
        each.has_ended.set()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("runs"))


CLOCKS = ("seconds", "train/tokens_per_second", "train/time/step", "train/time/data")
TWO = ["--trainer.devices=2", "--data.val_fraction=0", "--optimizer.lr=1e-3"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "number", "words"),
    [
        (1, signal.SIGKILL, "process 1 of the run was ended by SIGKILL"),
        (0, signal.SIGKILL, "Connection"),
        (1, signal.SIGSTOP, "process 1 of the run has given no sign of life"),
        (0, signal.SIGSTOP, "process 0 of the run has given no sign of life"),
    ],
)
def test_a_process_that_dies_or_hangs_ends_all(lab: Lab, rank: int, number: int, words: str) -> None:
    name = f"dies-{rank}-{number}"
    process = lab.start("fit", f"--name={name}", *TWO, "--trainer.max_epochs=2000")
    deadline = time.monotonic() + 120
    while not Run(lab.folder / name).metrics_path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    (child,) = [pid for pid in children_of(process) if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    began = time.monotonic()
    os.kill((process.pid, child)[rank], number)
    printed, _ = process.communicate(timeout=60)
    assert ended(child, 60 - (time.monotonic() - began))
    print(f"{signal.Signals(number).name} of process {rank}: {time.monotonic() - began:.1f} s")
    assert process.returncode in (1, -signal.SIGKILL) and words in printed


@pytest.mark.parametrize(
    ("rank", "memory"),
    [(1, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, False), (0, True), (1, True)))],
)
def test_an_error_in_one_process_ends_all(lab: Lab, rank: int, memory: bool) -> None:
    callback = "{class_path: tests.support.faults.FailInStep, init_args: "
    words = [f"--trainer.callbacks=[{callback}{{rank: {rank}, memory: {str(memory).lower()}}}}}]"]
    process = lab.start("fit", f"--name=fails-{rank}-{memory}", *TWO, "--trainer.max_epochs=2000", *words)
    children: set[int] = set()
    while process.poll() is None and not metrics_begun(lab, f"fails-{rank}-{memory}"):
        children |= set(children_of(process))
        time.sleep(0.05)
    began = time.monotonic()
    printed, _ = process.communicate(timeout=60)
    assert all(ended(child, 60 - (time.monotonic() - began)) for child in children)
    print(f"{'memory' if memory else 'error'} in process {rank}: {time.monotonic() - began:.1f} s")
    assert process.returncode == 1
    assert ("memory" if memory else "this process alone fails") in printed, printed[-2000:]
    assert children


def metrics_begun(lab: Lab, name: str) -> bool:
    return Run(lab.folder / name).metrics_path.exists()


@pytest.mark.slow
def test_a_signal_during_the_start_of_two_processes_leaves_none(lab: Lab) -> None:
    for seconds in (4, 8, 12):
        process = lab.start("fit", f"--name=early-{seconds}", *TWO, "--trainer.max_epochs=2000")
        time.sleep(seconds)
        children = children_of(process)
        began = time.monotonic()
        process.terminate()
        process.communicate(timeout=30)
        assert process.returncode == 143
        assert all(ended(child, 10) for child in children)
        assert time.monotonic() - began < 10


def test_a_resumed_run_of_two_processes_logs_the_same_means(lab: Lab) -> None:
    """The stop lies between two logged steps, and so does the end of the first epoch."""
    words = [*TWO, "--trainer.max_epochs=2", "--trainer.log_every_n_steps=3"]
    for name, *stop in (("whole",), ("parts", "--trainer.max_steps=4"), ("parts", "--ckpt_path=last")):
        process = lab.start("fit", f"--name={name}", *words, *stop)
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0, printed[-2000:]
    whole, parts = Run(lab.folder / "whole"), Run(lab.folder / "parts")
    assert checkpoint(parts)["global_step"] == checkpoint(whole)["global_step"] == 12
    rows = [[{k: v for k, v in row.items() if k not in CLOCKS} for row in metrics(run)] for run in (parts, whole)]
    assert rows[0] == rows[1]
    found, wanted = weights(parts), weights(whole)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)

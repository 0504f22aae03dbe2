"""A signal at every moment of a run: it ends in time, nothing is half there, and the run goes on as if it had not."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch

from dpo.callbacks.samples import AnswerSampler
from dpo.data.datamodule import PairData
from dpo.models.checkpoint_io import AtomicCheckpointIO
from dpo.runs import export
from dpo.runs.folder import Run
from dpo.runs.signals import PATIENCE, STOP_SIGNALS, StoppedBySignal, StopSignals
from dpo.training import preflight
from dpo.training.base import Stage
from tests.support.processes import children_of, ended
from tests.support.runs import ROOT, Lab, checkpoint, metrics, weights

BASE = ["--optimizer.lr=1e-3", "--trainer.val_check_interval=2", "--trainer.max_epochs=2"]  # five steps an epoch
CLOCKS = ("seconds", "train/tokens_per_second", "train/time/step", "train/time/data")
MOMENTS = {
    "reading data": (PairData, "setup", 1),
    "reading weights": (Stage, "configure_model", 1),
    "checking": (preflight, "run_preflight", 1),
    "taking the first step": (Stage, "training_step", 1),
    "validating": (Stage, "validation_step", 2),
    "logging a validation": (Stage, "on_validation_epoch_end", 2),
    "sampling": (AnswerSampler, "_sample", 2),
    "exporting": (export, "write_policy_files", 1),
}

ORDINARY = ("reading data", "validating", "exporting")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(lab: Lab) -> Run:
    """Two epochs without interruption."""
    return lab.fit("whole", *BASE)


@contextmanager
def signal_in(owner: Any, name: str, call: int, number: int = signal.SIGTERM) -> Iterator[None]:
    """Send this process a signal at a call of a function."""
    function = getattr(owner, name)
    calls = 0

    def called(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            signal.raise_signal(number)
        return function(*arguments, **options)

    with patch.object(owner, name, called):
        yield


def measured(run: Run) -> list[dict[str, float]]:
    """All rows of metrics.csv, those of validations too, without what the clock says."""
    return [{name: value for name, value in row.items() if name not in CLOCKS} for row in metrics(run)]


def assert_same(run: Run, expected: Run) -> None:
    assert measured(run) == measured(expected)
    assert run.samples_path.read_text() == expected.samples_path.read_text()
    found, wanted = weights(run), weights(expected)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert (run.export_folder / "model.safetensors").read_bytes() == (
        expected.export_folder / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "moment", [each if each in ORDINARY else pytest.param(each, marks=pytest.mark.slow) for each in MOMENTS]
)
def test_a_signal_ends_the_run_at_every_moment_and_nothing_is_lost(lab: Lab, whole: Run, moment: str) -> None:
    name = moment.replace(" ", "-")
    words = [f"--name={name}", *BASE, "--ckpt_path=auto"]
    with signal_in(*MOMENTS[moment]):
        assert lab.main("fit", *words) == 143
    run = Run(lab.folder / name)
    assert not list(run.folder.rglob(".*.tmp")) and not run.export_folder.exists()
    assert lab.main("fit", *words) == 0
    assert_same(run, whole)


def test_a_validation_due_at_the_step_of_a_stop_is_made_up(lab: Lab, whole: Run) -> None:
    words = ["--name=due", *BASE, "--ckpt_path=auto"]
    with signal_in(Stage, "training_step", 4):  # of the fourth step, after which the run validates
        assert lab.main("fit", *words) == 143
    run = Run(lab.folder / "due")
    assert ["val/loss" in row for row in metrics(run)] == [False, True, False, False]
    assert lab.main("fit", *words) == 0
    assert_same(run, whole)


def test_a_checkpoint_is_finished_before_the_run_ends(lab: Lab, whole: Run) -> None:
    words = ["--name=saving", *BASE, "--ckpt_path=auto", "--checkpoint.every_n_steps=1"]
    with signal_in(AtomicCheckpointIO, "save_checkpoint", 3, signal.SIGUSR1):
        assert lab.main("fit", *words) == 138
    run = Run(lab.folder / "saving")
    assert checkpoint(run)["global_step"] in (2, 3)
    assert lab.main("fit", *words) == 0
    assert_same(run, whole)


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_other_verbs_too(lab: Lab, whole: Run, number: int) -> None:
    with signal_in(Stage, "test_step", 1, number):
        assert lab.only("test", f"--config={whole.config_path}", "--ckpt_path=last") == 128 + number


def python(code: str, **environment: str) -> "subprocess.Popen[str]":
    """Start a program, and wait until it says that it has begun."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


STUCK = """
import hashlib
from dpo.runs.signals import RUN_SIGNALS
with RUN_SIGNALS:
    RUN_SIGNALS.finishes_step = {in_step}
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", {rounds})
"""


def test_a_process_in_a_call_that_does_not_return_ends_in_time() -> None:
    """As in a collective, whose other processes are gone: Python's own handlers never run."""
    process = python(STUCK.format(in_step=False, rounds=10**9))
    began = time.monotonic()
    process.send_signal(signal.SIGUSR2)
    process.communicate(timeout=30)
    assert process.returncode == 140
    assert PATIENCE - 1 < time.monotonic() - began < 10


@pytest.mark.parametrize(("seconds", "is_stuck"), [(2.0, False), (6.0, True)])
def test_a_signal_that_is_noticed_late_was_handled_all_the_same(seconds: float, is_stuck: bool) -> None:
    """On a busy machine, the thread that watches the main thread may run seconds after the handler has."""
    signals = StopSignals()
    signals._handled_at = time.monotonic() - seconds
    reader, writer = socket.socketpair()
    with writer:
        writer.send(bytes([signal.SIGTERM]))
    with patch.object(time, "sleep"), patch.object(os, "_exit") as exit_now:
        signals._end_stuck_process(reader)
    assert exit_now.called is is_stuck


@pytest.mark.slow
def test_a_long_step_is_not_cut() -> None:
    began = time.monotonic()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**6)
    rounds = int(10**6 * (PATIENCE + 2) / (time.monotonic() - began))  # longer than the patience
    process = python(STUCK.format(in_step=True, rounds=rounds))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0


PARENT = """
import subprocess, sys, time
from dpo.runs.signals import RUN_SIGNALS
with RUN_SIGNALS:
    RUN_SIGNALS.watch_children([subprocess.Popen([sys.executable, "-c", {child!r}])])
    time.sleep(1)
    print("begun", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("child", "code", "words"),
    [
        ("import time; time.sleep(2); raise SystemExit(3)", 1, "process 1 of the run ended with exit code 3"),
        ("import time; time.sleep(2); raise SystemExit(143)", 143, "process 1 of the run ended with exit code 143"),
        (
            "import os, time; time.sleep(2); os.kill(os.getpid(), 9)",
            1,
            "process 1 of the run was ended by SIGKILL (often the system's answer to a lack of memory)",
        ),
    ],
)
def test_the_end_of_a_launched_process_ends_all(child: str, code: int, words: str) -> None:
    process = python(PARENT.format(child=child))
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code and words in errors


def test_a_launched_process_ends_with_its_launcher() -> None:
    child = """
import time
from dpo.runs.signals import RUN_SIGNALS
with RUN_SIGNALS:
    time.sleep(60)
"""
    process = python(PARENT.format(child=child), LOCAL_RANK="1")
    (pid,) = children_of(process)
    process.kill()
    process.communicate()
    assert ended(pid, 10)


def test_a_scheduler_requeues_a_run_until_it_is_done(lab: Lab, whole: Run, monkeypatch) -> None:
    """As SLURM does: SIGUSR1 before the time is up, then the same command line again."""
    for name, value in {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "dpo",
        "SLURM_NTASKS": "1",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    words = ["--name=queued", *BASE, "--ckpt_path=auto"]
    codes = []
    while 0 not in codes and len(codes) < 10:
        with signal_in(Stage, "training_step", 3, signal.SIGUSR1):
            codes.append(lab.main("fit", *words))
    assert codes == [138, 138, 138, 0]
    assert_same(Run(lab.folder / "queued"), whole)
    assert not list(lab.folder.rglob("hpc_ckpt*"))
    results = json.loads(Run(lab.folder / "queued").results_path.read_text())
    assert results == json.loads(whole.results_path.read_text())


def test_a_signal_in_a_save_waits_for_its_hash(capsys: pytest.CaptureFixture[str]) -> None:
    """After a validation a signal ends the process at once, but not between a checkpoint and its hash."""
    written = []
    with pytest.raises(StoppedBySignal), StopSignals() as signals:
        assert not signals.finishes_step
        with signals.finishing():
            os.kill(os.getpid(), signal.SIGTERM)
            written.append("hash")
        written.append("next")
    assert written == ["hash"] and signals.exit_code == 143
    assert "Stopping after this step" in capsys.readouterr().out

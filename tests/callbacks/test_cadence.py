"""When checkpoints are saved, what is kept of them, and what a run goes on from."""

import signal
import subprocess
import time
from typing import Any
from unittest.mock import Mock, patch

import lightning as L
import pytest
import torch

from dpo.callbacks.agreement import agreement_of
from dpo.callbacks.checkpoints import CheckpointCadence, LastAndBest
from dpo.runs.folder import Run
from dpo.training.dpo import DPO
from tests.support.runs import Lab, checkpoint, metrics, weights

BASE = ["--optimizer.lr=1e-3", "--data.val_fraction=0", "--trainer.log_every_n_steps=3"]  # five steps an epoch


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(lab: Lab) -> Run:
    """Two epochs without interruption."""
    return lab.fit("whole", *BASE, "--trainer.max_epochs=2")


class BrokenError(RuntimeError):
    """Raised by a test in the middle of training."""


class Killed(BaseException):
    """As if the process were gone: no handler of ours saves anything."""


def fit_until(lab: Lab, batch: int, error: type[BaseException], *words: str) -> None:
    """Train until a batch of the run begins, and raise there."""
    step = DPO.training_step

    def training_step(module: DPO, given: Any, batch_idx: int) -> torch.Tensor:
        if module.trainer.fit_loop.epoch_loop.total_batch_idx == batch:
            raise error
        return step(module, given, batch_idx)

    with patch.object(DPO, "training_step", training_step), pytest.raises(error):
        lab.main("fit", *words)


def trained(run: Run) -> list[dict[str, float]]:
    """The rows of metrics.csv without what the clock says."""
    clocks = ("seconds", "train/tokens_per_second", "train/time/step", "train/time/data")
    return [{name: value for name, value in row.items() if name not in clocks} for row in metrics(run)]


def assert_same(run: Run, expected: Run) -> None:
    assert trained(run) == trained(expected)
    found, wanted = weights(run), weights(expected)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_checkpoints_are_saved_every_so_many_steps(lab: Lab, whole: Run) -> None:
    words = ["--name=steps", *BASE, "--trainer.max_epochs=2", "--checkpoint.every_n_steps=2"]
    fit_until(lab, 8, Killed, *words)
    run = Run(lab.folder / "steps")
    assert checkpoint(run)["global_step"] == 8
    assert checkpoint(run, "last-1")["global_step"] == 6
    lab.fit("steps", *words[1:], "--ckpt_path=last")
    assert_same(run, whole)


def test_checkpoints_are_saved_every_so_many_minutes(lab: Lab) -> None:
    clock = iter(range(0, 10_000, 31))  # half a minute, and more, at every look
    with patch.object(time, "monotonic", lambda: float(next(clock))):
        due = LastAndBest(Run(lab.folder / "minutes"), CheckpointCadence(every_minutes=1.0))
        trainer = Mock(spec=L.Trainer, global_step=1, world_size=1)
        agreement_of(trainer).numbers["late"] = due._is_late
        looks = [due._is_due(trainer) for _ in range(4)]  # the clock was read once when it was made
    assert looks == [False, True, True, True]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--checkpoint.every_n_steps=0", "--checkpoint.every_n_steps: expected a number above 0, or null, got 0"),
        ("--checkpoint.every_minutes=-1", "--checkpoint.every_minutes: expected a number above 0, or null, got -1"),
        ("--checkpoint.keep=0", "--checkpoint.keep: expected at least 1 generation, got 0"),
    ],
)
def test_impossible_cadences_are_refused(lab: Lab, capsys: pytest.CaptureFixture[str], word: str, message: str) -> None:
    assert lab.main("fit", "--name=impossible", *BASE, word) == 1
    assert message in capsys.readouterr().err
    assert not (lab.folder / "impossible").exists()


def test_other_verbs_read_the_cadence_of_a_run_and_take_none(
    lab: Lab, whole: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lab.only("test", f"--config={whole.config_path}", "--ckpt_path=last") == 0
    assert lab.only("test", f"--config={whole.config_path}", "--ckpt_path=last", "--checkpoint.keep=3") == 1
    assert "--checkpoint: expected none, as test saves no checkpoints." in capsys.readouterr().err


def test_an_exception_leaves_the_last_good_step(lab: Lab, whole: Run) -> None:
    words = ["--name=broken", *BASE, "--trainer.max_epochs=2"]
    fit_until(lab, 7, BrokenError, *words)
    assert checkpoint(Run(lab.folder / "broken"))["global_step"] == 7
    assert_same(lab.fit("broken", *words[1:], "--ckpt_path=last"), whole)


def test_a_run_ended_before_its_first_checkpoint_begins_again(
    lab: Lab, whole: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--name=auto", *BASE, "--trainer.max_epochs=2"]
    fit_until(lab, 4, Killed, *words)
    assert lab.main("fit", *words) == 1
    assert "begin it again, as it has no checkpoint, with --name auto --ckpt_path auto" in capsys.readouterr().err
    fit_until(lab, 7, Killed, *words, "--ckpt_path=auto")  # begins again, and has a checkpoint of the first epoch now
    assert_same(lab.fit("auto", *words[1:], "--ckpt_path=auto"), whole)
    assert_same(lab.fit("auto", *words[1:], "--ckpt_path=auto"), whole)  # there is nothing left to do


def test_auto_needs_a_name(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert lab.main("fit", *BASE, "--ckpt_path=auto") == 1
    assert "--ckpt_path auto: expected fit and the --name of the run" in capsys.readouterr().err


@pytest.mark.parametrize("harm", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_passed_over(lab: Lab, whole: Run, harm: str) -> None:
    words = [*BASE, "--trainer.max_epochs=2", "--checkpoint.every_n_steps=2"]
    run = lab.fit(harm, *words, "--trainer.max_steps=6")
    last = run.checkpoint_folder / "last.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content if harm == "flipped" else content[:100])
    if harm == "gone":
        last.unlink()
    with pytest.warns(UserWarning) as warned:
        lab.fit(harm, *words, "--ckpt_path=last")
    messages = [str(warning.message) for warning in warned]
    assert any(f"goes on from {run.checkpoint_folder / 'last-1.ckpt'}, the generation before" in m for m in messages)
    assert any(f"{last} is passed over" in m for m in messages) or harm == "gone"
    assert_same(run, whole)


def test_a_checkpoint_without_its_hash_is_said_to_be_unverified(lab: Lab, whole: Run) -> None:
    run = lab.fit("unhashed", *BASE, "--trainer.max_steps=2")
    (run.checkpoint_folder / "last.ckpt.sha256").unlink()
    for path in ("last", str(run.checkpoint_folder / "last.ckpt")):
        with pytest.warns(UserWarning) as warned:
            lab.fit("unhashed", *BASE, "--trainer.max_steps=2", f"--ckpt_path={path}")
        (text,) = {str(warning.message) for warning in warned}
        assert "last.ckpt has no SHA-256 beside it (last.ckpt.sha256): damage since it was written cannot be" in text
        assert text.endswith("training may go on from wrong weights.")


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_logged_means_are_those_of_the_uninterrupted_run(lab: Lab, whole: Run, stop: int) -> None:
    """Every third step is logged, with the means over three steps, wherever the run was stopped between."""
    words = [*BASE, "--trainer.max_epochs=2"]
    lab.fit(f"means-{stop}", *words, f"--trainer.max_steps={stop}")
    assert_same(lab.fit(f"means-{stop}", *words, "--ckpt_path=last"), whole)


def test_weights_that_are_not_finite_are_never_saved(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    step = DPO.optimizer_step

    def optimizer_step(module: DPO, *arguments: Any, **options: Any) -> None:
        step(module, *arguments, **options)
        with torch.no_grad():
            next(module.policy.parameters()).view(-1)[0] = float("inf")

    with patch.object(DPO, "optimizer_step", optimizer_step):
        assert lab.main("fit", "--name=infinite", *BASE, "--trainer.max_steps=1") == 1
    assert "are not finite" in capsys.readouterr().err
    run = Run(lab.folder / "infinite")
    assert not run.export_folder.exists() and not list(run.checkpoint_folder.glob("*.ckpt"))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGUSR2, 140)], ids=str
)
def test_schedulers_signals_stop_in_order(lab: Lab, number: int, code: int) -> None:
    step = DPO.training_step

    def training_step(module: DPO, given: Any, batch_idx: int) -> torch.Tensor:
        if module.global_step == 2:
            signal.raise_signal(number)
        return step(module, given, batch_idx)

    with patch.object(DPO, "training_step", training_step):
        assert lab.main("fit", f"--name=signal-{code}", *BASE) == code
    assert checkpoint(Run(lab.folder / f"signal-{code}"))["global_step"] == 3


def test_a_signal_to_the_second_process_is_the_exit_code_of_all(lab: Lab) -> None:
    words = [
        "--name=two",
        *BASE,
        "--trainer.devices=2",
        "--trainer.max_epochs=400",
        "--trainer.enable_progress_bar=true",
    ]
    process = lab.start("fit", *words)
    deadline = time.monotonic() + 120
    metrics_path = Run(lab.folder / "two").metrics_path
    while not metrics_path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    children = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    commands = {pid: subprocess.check_output(["ps", "-o", "args=", "-p", pid], text=True) for pid in children}
    (second,) = [pid for pid, command in commands.items() if "train.py" in command]
    subprocess.run(["kill", "-TERM", second], check=True)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output[-2000:]

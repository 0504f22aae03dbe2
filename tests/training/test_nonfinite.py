"""A loss or gradient that is not finite stops the run before it reaches the weights; the message names its pairs."""

import io
import re
import time
from dataclasses import dataclass
from typing import Any

import lightning as L
import pytest
import rich
import torch
from rich.console import Console
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpo.losses import DPO, PairLogps
from dpo.runs.folder import Run
from dpo.training.nonfinite import MAX_SKIPPED_IN_ROW, FiniteMonitor, NonFiniteError
from tests.support.processes import children_of, ended
from tests.support.runs import Lab, checkpoint, metrics, weights


@dataclass(frozen=True)
class Breaks(DPO):
    """DPO while policy and reference are equal, then NaN for every pair with a chosen answer of more than 15 tokens."""

    def __call__(self, logps: PairLogps) -> Tensor:
        losses, moved = super().__call__(logps), logps.logratios.abs().sum(-1) > 0
        long = logps.lengths[:, 0] > 15
        return losses + torch.where(moved & long, torch.nan, 0.0)


@dataclass(frozen=True)
class Steep(DPO):
    """A finite loss whose gradient is not finite where policy and reference are equal."""

    def __call__(self, logps: PairLogps) -> Tensor:
        chosen, rejected = logps.logratios.unbind(-1)
        return super().__call__(logps) + (chosen - rejected).abs().sqrt()


def broken_steps(*steps: int, rank: int = 0) -> str:
    """Return the option of a callback that breaks optimizer steps."""
    settings = f"{{steps: {list(steps)}, rank: {rank}}}"
    return f"--trainer.callbacks=[{{class_path: tests.support.faults.BreakSteps, init_args: {settings}}}]"


FINAL_WEIGHTS: dict[str, Tensor] = {}


class KeepWeights(L.Callback):
    """Keeps the weights of the moment when the run fails."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        FINAL_WEIGHTS.update({name: value.clone() for name, value in pl_module.state_dict().items()})


@pytest.fixture
def lab(tmp_path) -> Lab:
    return Lab(tmp_path)


WORDS = ["--trainer.callbacks=tests.training.test_nonfinite.KeepWeights", "--optimizer.lr=1e-3", "--data.shuffle=false"]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_rows(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model.loss=tests.training.test_nonfinite.Breaks", "--trainer.val_check_interval=1", *WORDS]
    assert lab.main("fit", "--name=broken", *words) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: step 2: the loss is not finite for the pairs pairs/train:")
    assert "The weights are still those from before this step. Try a smaller --optimizer.lr" in message
    run = Run(lab.folder / "broken")
    assert [row["step"] for row in metrics(run)] == [1]
    saved = weights(run)
    assert all(value.isfinite().all() for value in saved.values())
    assert all(torch.equal(FINAL_WEIGHTS[name], saved[name]) for name in saved), "the step was not taken"
    assert not run.export_folder.exists()


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_step(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model.loss=tests.training.test_nonfinite.Steep", "--model.preflight=false", *WORDS]
    assert lab.main("fit", "--name=steep", *words) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: step 1: the gradient is not finite for the pairs")
    assert message.count("pairs/train:") == 4
    assert all(value.isfinite().all() for value in FINAL_WEIGHTS.values())


@pytest.mark.parametrize("save", [False, True])
def test_a_fused_optimizer_skips_the_step_until_the_host_asks(
    lab: Lab, capsys: pytest.CaptureFixture[str], save: bool
) -> None:
    words = [
        "--model.loss=tests.training.test_nonfinite.Breaks",
        "--trainer.max_steps=4",
        "--optimizer.fused=true",
        *WORDS,
    ]
    words += ["--trainer.val_check_interval=3"] if save else ["--trainer.log_every_n_steps=4"]
    good = lab.fit("good", *words, "--trainer.max_steps=1")
    assert lab.main("fit", "--name=fused", *words) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: step 2: the loss is not finite for the pairs pairs/train:")
    assert all(torch.equal(FINAL_WEIGHTS[name], value) for name, value in weights(good).items()), "only step 1"
    assert not Run(lab.folder / "fused").checkpoint_folder.exists()


class WaitCounter(TorchDispatchMode):
    """Counts how often the host reads a number from the device, which waits for the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        WaitCounter.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class CountWaits(L.Callback):
    """Counts waits per training step. The module logs in its own `on_train_batch_end`, after those of the callbacks."""

    def on_train_batch_start(self, *_: object) -> None:
        WaitCounter.count = 0
        self.mode = WaitCounter()
        self.mode.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        self.mode.__exit__(None, None, None)
        WAITS_BY_STEP[trainer.global_step] = WaitCounter.count


WAITS_BY_STEP: dict[int, int] = {}


def test_the_host_waits_for_the_device_at_logged_steps_only(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the progress line, as on a terminal."""
    monkeypatch.setattr(rich, "_console", Console(force_terminal=True, file=io.StringIO()))
    words = ["--trainer.callbacks=tests.training.test_nonfinite.CountWaits", "--optimizer.fused=true"]
    words += ["--trainer.enable_progress_bar=true", "--trainer.log_every_n_steps=2", "--data.val_fraction=0"]
    lab.fit("waits", *words, "--trainer.max_steps=4")
    assert "step 4/4" in rich.get_console().file.getvalue()
    assert WAITS_BY_STEP[1] == WAITS_BY_STEP[3] == 0


def test_only_pairs_with_a_bad_loss_are_named() -> None:
    monitor = FiniteMonitor()
    monitor.add_losses(("a", "b"), torch.tensor([1.0, torch.inf]))
    monitor.add_losses(("c",), torch.tensor([torch.nan]))
    assert monitor.close_step(7, torch.tensor(1.0)) == 1
    with pytest.raises(NonFiniteError, match=r"step 7: the loss is not finite for the pairs b, c\. "):
        monitor.raise_if_nonfinite()


def test_finite_steps_are_discarded() -> None:
    monitor = FiniteMonitor()
    monitor.add_losses(("a",), torch.tensor([1.0]))
    assert monitor.close_step(1, torch.tensor(2.0)) == 0
    monitor.raise_if_nonfinite()
    monitor.add_losses(("b",), torch.tensor([1.0]))
    assert monitor.close_step(2, torch.tensor(torch.inf)) == 1
    monitor.add_losses(("c",), torch.tensor([1.0]))
    assert monitor.close_step(3, torch.tensor(1.0)) == 1, "later steps are skipped too"
    with pytest.raises(NonFiniteError, match=r"step 2: the gradient is not finite for the pairs b\. "):
        monitor.raise_if_nonfinite()


SKIP = ["--model.on_nonfinite=skip", "--data.val_fraction=0", "--optimizer.lr=1e-3"]
SCHEDULE = ["--lr_scheduler=Warmup", "--lr_scheduler.warmup_steps=4"]
CLOCKS = ("seconds", "train/tokens_per_second", "train/time/step", "train/time/data")


def measured(run: Run) -> list[dict[str, str]]:
    """The rows of metrics.csv as text, in which NaN equals NaN, without what the clock says."""
    return [{name: str(value) for name, value in row.items() if name not in CLOCKS} for row in metrics(run)]


def skipped(warned: pytest.WarningsRecorder) -> list[str]:
    """Return the warnings of steps that were left out."""
    return [message for message in (str(each.message) for each in warned) if "is not finite" in message]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_skipped_step_changes_neither_weights_nor_optimizer(
    lab: Lab, caplog: pytest.LogCaptureFixture, fused: bool
) -> None:
    words = [*SKIP, *SCHEDULE, broken_steps(3, 4), f"--optimizer.fused={fused}", "--trainer.log_every_n_steps=2"]
    two = checkpoint(lab.fit("two", *words, "--trainer.max_steps=2"))
    with pytest.warns(UserWarning) as warned:
        run = lab.fit("four", *words, "--trainer.max_steps=4")
    four = checkpoint(run)
    assert all(torch.equal(four["state_dict"][name], value) for name, value in two["state_dict"].items())
    states, others = (each["optimizer_states"][0]["state"] for each in (two, four))
    assert states.keys() == others.keys() and len(states) > 0
    assert all(torch.equal(others[key][name], value) for key in states for name, value in states[key].items())
    assert four["global_step"] == four["lr_schedulers"][0]["last_epoch"] == 4
    messages = skipped(warned)
    assert [message.partition(" pairs/")[0] for message in messages] == [
        f"step {step}: the loss is not finite for the pairs" for step in (3, 4)
    ]
    assert all(message.endswith("The step is left out (--model.on_nonfinite skip).") for message in messages)
    assert all(message.count("pairs/train:") == 1 for message in messages), "only the pair with the bad loss"
    first, second = metrics(run)
    assert (first["train/skipped_steps"], second["train/skipped_steps"]) == (0, 2)
    assert "Left out: 2 of the steps" in caplog.text


def test_means_are_of_the_steps_that_are_taken(lab: Lab) -> None:
    words = [*SKIP, "--trainer.max_steps=2", "--data.shuffle=false"]
    one = lab.fit("alone", *words, "--trainer.max_steps=1")
    with pytest.warns(UserWarning, match="step 2: the loss is not finite"):
        both = lab.fit("both", *words, broken_steps(2), "--trainer.log_every_n_steps=2")
    (expected,), (found,) = metrics(one), metrics(both)
    for name in ("loss", "logps/chosen", "rewards/margins", "length/chosen"):
        assert found[f"train/{name}"] == expected[f"train/{name}"]


def test_a_skipped_gradient_names_all_pairs_of_its_step(lab: Lab) -> None:
    """The first gradient is not finite, and the weights stay as they are, so that the next ones are not either."""
    words = [*SKIP, "--model.loss=tests.training.test_nonfinite.Steep", "--model.preflight=false"]
    with pytest.warns(UserWarning) as warned:
        run = lab.fit("steep", *words, "--trainer.max_steps=2")
    messages = skipped(warned)
    assert [message.partition(" pairs ")[0] for message in messages] == [
        f"step {step}: the gradient is not finite for the" for step in (1, 2)
    ]
    assert [message.count("pairs/train:") for message in messages] == [4, 4]
    assert metrics(run)[-1]["train/skipped_steps"] == 2


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_too_many_steps_in_a_row_stop_the_run(lab: Lab, capsys: pytest.CaptureFixture[str], fused: bool) -> None:
    words = [*SKIP, "--trainer.max_epochs=3", f"--optimizer.fused={fused}", "--trainer.log_every_n_steps=3"]
    broken = broken_steps(2, *range(4, 5 + MAX_SKIPPED_IN_ROW))
    with pytest.warns(UserWarning):
        assert lab.main("fit", "--name=many", *words, broken) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.match(
        r"error: step \d+: the loss is not finite for the pairs pairs/train:\d+\. More than 10 steps", message
    )
    saved = checkpoint(Run(lab.folder / "many"))
    assert 4 < saved["global_step"] < 14
    with pytest.warns(UserWarning, match="step 16: the loss"):
        run = lab.fit("many", *words, broken_steps(16), "--ckpt_path=last")
    assert checkpoint(run)["global_step"] == 18, "what broke the steps is mended"


@pytest.mark.filterwarnings(r"ignore:step \d. the loss is not finite")
@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_resumed_run_skips_as_the_uninterrupted_one(lab: Lab, stop: int) -> None:
    words = [*SKIP, *SCHEDULE, broken_steps(3, 6), "--trainer.max_epochs=2", "--trainer.log_every_n_steps=2"]
    whole = lab.fit("whole", *words)
    lab.fit("parts", *words, f"--trainer.max_steps={stop}")
    parts = lab.fit("parts", *words, "--ckpt_path=last")
    assert measured(parts) == measured(whole)
    found, wanted = weights(parts), weights(whole)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def two_processes(lab: Lab, name: str, *words: str) -> tuple[int, str]:
    """Train in two processes; return exit code and output, once both processes are gone."""
    began = time.monotonic()
    process = lab.start("fit", f"--name={name}", *words, "--trainer.devices=2", "--trainer.max_steps=4")
    children: set[int] = set()
    while process.poll() is None and not children:
        children |= set(children_of(process))
        time.sleep(0.2)
    printed, _ = process.communicate(timeout=120)
    assert all(ended(child, 10) for child in children), f"{time.monotonic() - began:.0f} s"
    return process.returncode, printed


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_loss_of_one_process_stops_all(lab: Lab, strategy: str) -> None:
    words = ["--data.val_fraction=0", f"--trainer.strategy={strategy}", broken_steps(2, rank=1)]
    code, printed = two_processes(lab, "stops", *words)
    assert code == 1
    assert printed.count("error: step 2: the loss is not finite for the pairs pairs/train:") >= 1, printed[-3000:]
    assert "has given no sign of life" not in printed
    assert [row["step"] for row in metrics(Run(lab.folder / "stops"))] == [1]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_loss_of_one_process_is_skipped_by_all(lab: Lab, strategy: str) -> None:
    """As in one process: the step is left out with all of its pairs."""
    with pytest.warns(UserWarning, match="step 2: the loss"):
        one = lab.fit("one", *SKIP, broken_steps(2), "--trainer.max_steps=4")
    code, printed = two_processes(lab, "two", *SKIP, broken_steps(2, rank=1), f"--trainer.strategy={strategy}")
    assert code == 0, printed[-3000:]
    assert printed.count("step 2: the loss is not finite for the pairs pairs/train:") == 1
    found, wanted = weights(Run(lab.folder / "two")), weights(one)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
    assert metrics(Run(lab.folder / "two"))[-1]["train/skipped_steps"] == 1

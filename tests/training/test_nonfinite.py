"""A loss or gradient that is not finite stops the run before it reaches the weights; the message names its pairs."""

import io
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
from dpo.training.nonfinite import FiniteMonitor, NonFiniteError
from tests.support.runs import Lab, metrics, weights


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

"""A number that is not finite stops the run before it reaches the weights, and says where it came from."""

from dataclasses import dataclass
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpo.losses import DPO, PairLogps
from dpo.runs.folder import Run
from dpo.training.nonfinite import FiniteMonitor, NonFiniteError
from tests.support.runs import Lab, metrics, weights


@dataclass(frozen=True)
class Breaks(DPO):
    """As DPO while policy and reference are equal, then NaN for every pair whose chosen answer has three sentences."""

    def __call__(self, logps: PairLogps) -> Tensor:
        losses, moved = super().__call__(logps), logps.logratios.abs().sum(-1) > 0
        long = logps.lengths[:, 0] > 15
        return losses + torch.where(moved & long, torch.nan, 0.0)


@dataclass(frozen=True)
class Steep(DPO):
    """A loss that is finite, with a gradient that is not."""

    def __call__(self, logps: PairLogps) -> Tensor:
        chosen, rejected = logps.logratios.unbind(-1)
        return super().__call__(logps) + (chosen - rejected).abs().sqrt()


LEFT: dict[str, Tensor] = {}


class Witness(L.Callback):
    """Keeps the weights as they are when the run breaks off."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        LEFT.update({name: value.clone() for name, value in pl_module.state_dict().items()})


@pytest.fixture
def lab(tmp_path) -> Lab:
    return Lab(tmp_path)


WORDS = ["--trainer.callbacks=tests.training.test_nonfinite.Witness", "--optimizer.lr=1e-3", "--data.shuffle=false"]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_rows(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model.loss=tests.training.test_nonfinite.Breaks", "--trainer.val_check_interval=1", *WORDS]
    assert lab.main("fit", "--name=broken", *words) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("NonFinite: step 2: the loss is not finite for the pairs pairs/train:")
    assert "The weights are those before this step and the last checkpoint is intact" in message
    run = Run(lab.folder / "broken")
    assert [row["step"] for row in metrics(run)] == [1]
    saved = weights(run)
    assert all(value.isfinite().all() for value in saved.values())
    assert all(torch.equal(LEFT[name], saved[name]) for name in saved), "the step was not taken"
    assert not run.export_folder.exists()


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_step(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model.loss=tests.training.test_nonfinite.Steep", "--model.preflight=false", *WORDS]
    assert lab.main("fit", "--name=steep", *words) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("NonFinite: step 1: the gradient is not finite for the pairs")
    assert message.count("pairs/train:") == 4
    assert all(value.isfinite().all() for value in LEFT.values())


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
    assert message.startswith("NonFinite: step 2: the loss is not finite for the pairs pairs/train:")
    assert all(torch.equal(LEFT[name], value) for name, value in weights(good).items()), "no step after the first"
    assert not Run(lab.folder / "fused").checkpoint_folder.exists()


class Waits(TorchDispatchMode):
    """Counts reads of a number from the device by the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        Waits.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class CountWaits(L.Callback):
    """Of every training step; logging comes before `on_train_batch_end` of callbacks ends, in the module's hook."""

    def on_train_batch_start(self, *_: object) -> None:
        Waits.count = 0
        self.mode = Waits()
        self.mode.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        self.mode.__exit__(None, None, None)
        WAITED[trainer.global_step] = Waits.count


WAITED: dict[int, int] = {}


def test_the_host_waits_for_the_device_at_logged_steps_only(lab: Lab) -> None:
    words = ["--trainer.callbacks=tests.training.test_nonfinite.CountWaits", "--optimizer.fused=true"]
    lab.fit("waits", *words, "--trainer.max_steps=4", "--trainer.log_every_n_steps=2")
    assert WAITED[1] == WAITED[3] == 0


def test_only_the_rows_to_blame_are_named() -> None:
    watch = FiniteMonitor()
    watch.add_losses(("a", "b"), torch.tensor([1.0, torch.inf]))
    watch.add_losses(("c",), torch.tensor([torch.nan]))
    assert watch.close_step(7, torch.tensor(1.0)) == 1
    with pytest.raises(NonFiniteError, match=r"step 7: the loss is not finite for the pairs b, c\. "):
        watch.raise_if_nonfinite()


def test_a_step_that_is_finite_is_forgotten() -> None:
    watch = FiniteMonitor()
    watch.add_losses(("a",), torch.tensor([1.0]))
    assert watch.close_step(1, torch.tensor(2.0)) == 0
    watch.raise_if_nonfinite()
    watch.add_losses(("b",), torch.tensor([1.0]))
    assert watch.close_step(2, torch.tensor(torch.inf)) == 1
    watch.add_losses(("c",), torch.tensor([1.0]))
    assert watch.close_step(3, torch.tensor(1.0)) == 1, "what comes after is skipped too"
    with pytest.raises(NonFiniteError, match=r"step 2: the gradient is not finite for the pairs b\. "):
        watch.raise_if_nonfinite()

"""A number that is not finite stops the run before it reaches the weights, and says where it came from."""

from dataclasses import dataclass

import lightning as L
import pytest
import torch
from torch import Tensor

from dpo.finite import NonFinite, Watch
from dpo.losses import DPO, PairLogps
from dpo.run import Run
from tests.runs import Lab, metrics, weights


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


WORDS = ["--trainer.callbacks=tests.test_finite.Witness", "--optimizer.lr=1e-3", "--data.shuffle=false"]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_rows(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model.loss=tests.test_finite.Breaks", "--trainer.val_check_interval=1", *WORDS]
    assert lab.main("fit", "--name=broken", *words) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("NonFinite: step 2: the loss is not finite for the pairs pairs/train:")
    assert "The weights are those before this step and the last checkpoint is intact" in message
    run = Run(lab.folder / "broken")
    assert [row["step"] for row in metrics(run)] == [1]
    saved = weights(run)
    assert all(value.isfinite().all() for value in saved.values())
    assert all(torch.equal(LEFT[name], saved[name]) for name in saved), "the step was not taken"
    assert not run.export.exists()


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_step(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model.loss=tests.test_finite.Steep", "--model.preflight=false", *WORDS]
    assert lab.main("fit", "--name=steep", *words) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("NonFinite: step 1: the gradient is not finite for the pairs")
    assert message.count("pairs/train:") == 4
    assert all(value.isfinite().all() for value in LEFT.values())


def test_only_the_rows_to_blame_are_named() -> None:
    watch = Watch()
    watch.add(("a", "b"), torch.tensor([1.0, torch.inf]))
    watch.add(("c",), torch.tensor([torch.nan]))
    with pytest.raises(NonFinite, match=r"step 7: the loss is not finite for the pairs b, c\. "):
        watch.check(7, torch.tensor(1.0))


def test_a_step_that_is_finite_is_forgotten() -> None:
    watch = Watch()
    watch.add(("a",), torch.tensor([1.0]))
    watch.check(1, torch.tensor(2.0))
    watch.add(("b",), torch.tensor([1.0]))
    with pytest.raises(NonFinite, match=r"the gradient is not finite for the pairs b\. "):
        watch.check(2, torch.tensor(torch.inf))

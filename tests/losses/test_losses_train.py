"""Every configuration under configs/losses, laid over the quickstart's, on the command line.

After thirty steps the chosen answer of held-out pairs has the higher reward more often than before.
"""

import json
from pathlib import Path

import pytest

from dpo.cli.class_names import sibling_classes
from tests.support.runs import ROOT, Lab

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
LOSSES = sorted((ROOT / "configs" / "losses").glob("*.yaml"))
FAST = {"ipo", "simpo", "ld", "nca", "odpo"}  # one of each kind; all others are run by `make test-slow`
NO_REFERENCE = {"simpo", "cpo", "orpo", "nll"}
SMALL = [
    *("--model.policy=quickstart", "--data.path=quickstart", "--data.limit=500", "--data.batch_size=8"),
    *("--data.max_length=64", "--data.val_fraction=0.15", "--trainer.val_check_interval=30", "--trainer.max_steps=30"),
]


def test_every_loss_has_a_configuration() -> None:
    shown = " ".join(file.read_text() for file in LOSSES)
    for loss in sibling_classes("dpo.losses.DPO"):
        if not loss.__module__.startswith("dpo."):
            continue  # a user's own, from another test
        assert f"class_path: {loss.__name__}\n" in shown or f"class_path: {loss.__name__}}}" in shown, loss


def accuracy(lab: Lab, verb: str, name: str, loss: Path) -> float:
    """Return the held-out reward accuracy after `fit` or `validate`."""
    assert lab.main(verb, f"--config={QUICKSTART}", f"--config={loss}", f"--name={name}", *SMALL) == 0
    results: dict[str, float] = json.loads((lab.folder / name / "results.json").read_text())
    assert ("val/displaced" in results) == (loss.stem not in NO_REFERENCE)
    return results["val/rewards/accuracies"]


@pytest.mark.parametrize(
    "loss", [pytest.param(file, id=file.stem, marks=() if file.stem in FAST else pytest.mark.slow) for file in LOSSES]
)
def test_thirty_steps_improve_held_out_accuracy(loss: Path, tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    # A policy that equals its reference has rewards of 0, which is as good as a coin.
    before = accuracy(lab, "validate", "before", loss) if loss.stem in NO_REFERENCE else 0.5
    assert accuracy(lab, "fit", "after", loss) > before


@pytest.mark.parametrize("cut", ["--data.max_tokens=100", "--trainer.accumulate_grad_batches=2"])
@pytest.mark.parametrize("preflight", ["true", "false"])
def test_a_loss_of_whole_steps_refuses_split_steps(
    cut: str, preflight: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model.loss=AOT", "--data.max_tokens=null", f"--model.preflight={preflight}", "--trainer.max_steps=1"]
    assert Lab(tmp_path).main("fit", *words, cut) == 1
    message = capsys.readouterr().err
    assert "AOT" in message and "sorts all pairs of an optimizer step together" in message
    assert "Use --data.max_tokens null, one device and --trainer.accumulate_grad_batches 1." in message


def test_a_loss_without_a_reference_refuses_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Lab(tmp_path).main("fit", "--model.loss=SimPO", "--model.reference=quickstart") == 1
    assert "takes no reference, got Model(path='quickstart')" in capsys.readouterr().err
    assert Lab(tmp_path).main("fit", "--model.loss=DPO", "--model.reference=Nothing") == 1
    assert "needs a reference, got Nothing()" in capsys.readouterr().err


def test_a_loss_without_a_reference_keeps_no_second_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Lab(tmp_path).fit("simpo", "--model.loss=SimPO", "--trainer.max_steps=2", "--trainer.val_check_interval=2")
    assert "Reference: none, the loss needs none." in caplog.messages
    assert "the loss at step 0 is not checked (it depends on what the policy already knows)" in caplog.text
    rows = [json.loads(line) for line in run.samples_path.read_text().splitlines()]
    assert rows and all("reference" not in row for row in rows)

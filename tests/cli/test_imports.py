"""Nothing that a command line or a configuration names is imported or called unless it is known or allowed."""

import os
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.runs import Lab

MODULE = """
from dataclasses import dataclass
from pathlib import Path
from dpo.losses import DPO

Path(__file__).with_suffix(".imported").touch()


@dataclass(frozen=True)
class Loss(DPO):
    '''A loss of one's own.'''


def half(step):
    return 0.5
"""
LAMBDA = ["--lr_scheduler", "LambdaLR", "--lr_scheduler.lr_lambda"]
ONE_STEP = ["--trainer.max_steps=1", "--data.val_fraction=0"]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Name of a module, one for each test, in the working folder."""
    name = f"own{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name


def refused(lab: Lab, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the message of a command line that is refused."""
    try:
        assert lab.main("fit", "--name=refused", *ONE_STEP, *words) == 1
    except SystemExit as end:
        assert end.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("way", ["option", "configuration"])
def test_a_class_of_another_module_is_not_imported(
    module: str, way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--model.loss={module}.Loss"]
    if way == "configuration":
        Path("from_elsewhere.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"loss": f"{module}.Loss"}}}))
        words = ["--config=from_elsewhere.yaml"]
    message = refused(Lab(tmp_path), capsys, *words)
    assert f"got '{module}.Loss', which is not imported. If it is yours: --allow-import {module}." in message
    assert module not in sys.modules and not Path(f"{module}.imported").exists()


def test_a_module_that_is_named_is_imported(module: str, tmp_path: Path) -> None:
    words = [f"--model.loss={module}.Loss", *LAMBDA, f"{module}.half", "--allow-import", module]
    run = Lab(tmp_path).fit("own", *ONE_STEP, *words)
    config = yaml.safe_load(run.config_path.read_text())
    assert config["model"]["init_args"]["loss"]["class_path"] == f"{module}.Loss"
    assert "import" not in str(config.keys()), "a configuration allows nothing"


def test_an_allowed_class_must_be_of_the_expected_base(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(Lab(tmp_path), capsys, f"--optimizer={module}.Loss", f"--allow-import={module}")
    assert message.startswith("error: --optimizer: expected one of") and "which is of another kind" in message


@pytest.mark.parametrize("function", ["os._exit", "subprocess.call", "torch.ones", "dpo.losses.base.sum_per_answer"])
def test_functions_are_no_values(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[object] = []
    monkeypatch.setattr(os, "_exit", called.append)
    message = refused(Lab(tmp_path), capsys, *LAMBDA, function)
    assert message.startswith("error: --lr_scheduler.lr_lambda: expected ") and "--allow-import" in message
    assert not called and not (tmp_path / "refused").exists()

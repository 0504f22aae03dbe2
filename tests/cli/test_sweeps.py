"""The commands of docs/sweeps.md as they stand, and the command line that W&B makes of configs/sweep.yaml."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from dpo.cli.main import main
from tests.support.runs import ROOT, pairs, policy

DOCUMENT = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")


def test_the_loop_trains_from_one_cached_reference_and_is_compared(tmp_path: Path) -> None:
    script, _ = re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL)  # the other one needs an account
    small = {
        "model.policy": policy(),
        "data.path": pairs(),
        "data.subsets": "[pairs]",
        "data.max_length": 128,
        "data.batch_size": 4,
        "data.val_fraction": 0.2,
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 1,
        "trainer.precision": "32-true",
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
    }
    options = " ".join(f"--{name}={value}" for name, value in small.items())
    script = script.replace("train.py fit", f"{ROOT / 'train.py'} fit").replace('"$lr"\n', f'"$lr" {options}\n')
    assert script.count(options) == 1
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DPO_CACHE": str(tmp_path / "cache"),
        "COLUMNS": "100",
    }
    done = subprocess.run(
        ["bash", "-eu", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "cache").glob("reference-*.safetensors"))) == 1  # one reference for four runs

    runs = json.loads((tmp_path / "comparison.json").read_text())
    assert [run["run"] for run in runs] == [
        f"runs/beta{beta}-lr{rate}" for beta in ("0.05", "0.3") for rate in ("1e-6", "5e-6")
    ]
    assert [run["options"] for run in runs] == [
        {"model.loss.beta": beta, "optimizer.lr": rate} for beta in (0.05, 0.3) for rate in (1e-6, 5e-6)
    ]
    assert {run["state"] for run in runs} == {"finished"}
    assert {run["results"]["steps"] for run in runs} == {2}
    for run in runs:
        stored = json.loads((tmp_path / run["run"] / "results.json").read_text())
        assert run["results"]["last validation loss"] == pytest.approx(stored["val/loss"], rel=1e-6)
    assert "| model.loss.beta | 0.05 | 0.05 | 0.3 | 0.3 |" in (tmp_path / "comparison.md").read_text()


def test_the_command_of_an_agent_is_understood(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    sweep = yaml.safe_load((ROOT / "configs" / "sweep.yaml").read_text())
    arguments = {"model.loss.beta": {"value": 0.3}, "optimizer.lr": {"value": 2e-06}}
    assert arguments.keys() == sweep["parameters"].keys()
    macros = create_sweep_command_args({"args": arguments})
    macros |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [sweep["program"]]}
    words = [
        each
        for word in create_sweep_command(sweep["command"])
        for each in (macros[word[2:-1]] if word.startswith("${") else [word])
    ]
    assert words[:4] == ["/usr/bin/env", "python", "train.py", "fit"]
    with patch.object(sys, "argv", ["train.py"]), pytest.raises(SystemExit) as end:
        main([*words[3:], "--print_config"])
    assert end.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["init_args"]["loss"]["init_args"]["beta"] == 0.3
    assert config["model"]["init_args"]["reference"]["class_path"] == "dpo.Cached"
    assert config["optimizer"]["init_args"]["lr"] == 2e-6
    assert config["data"]["init_args"]["path"] == "Anthropic/hh-rlhf"


def test_the_metric_of_the_sweep_is_one_that_is_logged() -> None:
    sweep = yaml.safe_load((ROOT / "configs" / "sweep.yaml").read_text())
    header = (ROOT / "dpo" / "quickstart" / "trained" / "metrics.csv").read_text().splitlines()[0]
    assert sweep["metric"]["name"] in header.split(",")

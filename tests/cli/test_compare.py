"""`python -m dpo compare`: folders of runs with known content, and every state a run may be in."""

import json
from pathlib import Path

import pytest
import yaml

from dpo import __main__ as verbs

CONFIG = {
    "name": "any",
    "trainer": {"max_steps": 4, "default_root_dir": "runs", "callbacks": None},
    "model": {
        "class_path": "dpo.DPO",
        "init_args": {"loss": {"class_path": "dpo.losses.DPO", "init_args": {"beta": 0.1}}},
    },
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-6}},
}
METRICS = """step,train/tokens_per_second,train/loss,val/loss,val/rewards/accuracies,val/rewards/margins
1,100,0.69,,,
2,300,0.6,0.5,0.75,1.25
4,200,0.5,0.625,0.5,2.5
"""


def write_run(
    folder: Path, loss: str = "DPO", rate: float = 1e-6, metrics: str = METRICS, finished: bool = True
) -> Path:
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    config["name"] = folder.name
    config["model"]["init_args"]["loss"]["class_path"] = f"dpo.losses.{loss}"
    config["optimizer"]["init_args"]["lr"] = rate
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if metrics:
        (folder / "metrics.csv").write_text(metrics)
    if finished:
        (folder / "export").mkdir()
    return folder


def compare(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = verbs.main(["compare", *map(str, words)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_differing_options_and_results(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("a"))
    write_run(Path("b"), loss="IPO", rate=5e-6)
    Path("b", "results.json").write_text(
        json.dumps({"val/loss": 0.625, "test/loss": 0.25, "test/rewards/accuracies": 1})
    )
    code, out, _ = compare(capsys, "a", "b", "--markdown")
    assert code == 0
    assert out.rstrip() == (
        "|  | a | b |\n"
        "| --- | ---: | ---: |\n"
        "| state | finished | finished |\n"
        "| model.loss | DPO | IPO |\n"
        "| optimizer.lr | 1e-06 | 5e-06 |\n"
        "| steps | 4 | 4 |\n"
        "| last validation loss | 0.625 | 0.625 |\n"
        "| best validation loss | 0.5 | 0.5 |\n"
        "| best at step | 2 | 2 |\n"
        "| accuracy | 0.5 | 0.5 |\n"
        "| margin | 2.5 | 2.5 |\n"
        "| tokens/s (median) | 200 | 200 |\n"
        "| test loss | - | 0.25 |\n"
        "| test accuracy | - | 1 |"
    )


def test_json_has_all_digits_and_no_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "a", metrics=METRICS + "5,100,nan,nan,0.123456789,1\n")
    code, out, _ = compare(capsys, folder, "--json")
    assert code == 0
    (run,) = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert run["results"]["last validation loss"] is None
    assert run["results"]["best validation loss"] == 0.5  # nan is no best
    assert run["results"]["accuracy"] == 0.123456789
    assert run["options"] == {}


def test_unfinished_and_unreadable_runs_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_run(tmp_path / "good")
    killed = write_run(tmp_path / "killed", finished=False)
    began = write_run(tmp_path / "began", metrics="", finished=False)
    stopped = write_run(tmp_path / "stopped", metrics="step,train/loss\n3,0.5\n")
    broken = write_run(tmp_path / "broken")
    (broken / "config.yaml").write_text("{")
    text = write_run(tmp_path / "text", metrics="step,val/loss\n1,much\n")
    other = tmp_path / "other"
    other.mkdir()
    nowhere = tmp_path / "nowhere"
    folders = [good, killed, began, stopped, broken, text, other, nowhere]
    code, out, error = compare(capsys, *folders, "--json")
    states = {Path(run["run"]).name: (run["state"], run["remark"]) for run in json.loads(out)}
    assert code == 1
    assert error == "error: 4 of 8 runs could not be read.\n"
    assert states["good"] == ("finished", "")
    assert states["killed"][0] == states["began"][0] == "unfinished"
    assert states["killed"][1].endswith("the last logged step is 4")
    assert states["began"][1].endswith("the last logged step is 0")
    assert states["stopped"] == ("stopped", "ended at step 3 of 4")
    assert {states[name][0] for name in ("broken", "text", "other", "nowhere")} == {"unreadable"}
    assert "much" in states["text"][1]
    assert states["other"][1] == "no config.yaml: not the folder of a run"
    assert states["nowhere"][1] == "there is no such folder"
    code, out, _ = compare(capsys, *folders)
    assert code == 1
    assert f"{nowhere} is unreadable: there is no such folder." in out
    assert f"{stopped} is stopped: ended at step 3 of 4." in out


def test_the_table_fits_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [str(write_run(Path(f"run-{number}"), rate=number * 1e-6)) for number in range(1, 8)]
    for width, tables in ((60, 3), (160, 1)):
        monkeypatch.setenv("COLUMNS", str(width))
        code, out, _ = compare(capsys, *names)
        assert code == 0
        assert max(map(len, out.splitlines())) <= width
        assert out.count("best validation loss") == tables
        assert all(out.count(f"{name} ") == 1 for name in names)
        assert all(f"{number}e-06" in out for number in range(1, 8))

"""Loggers of every kind: what a fit, a resumed fit and a test leave there, read back with their own readers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from wandb.proto.wandb_internal_pb2 import Record

from dpo.runs.folder import Run
from tests.support.runs import Lab, metrics

OPTIONS = ("--trainer.val_check_interval=2", "--name=one")
RESULTS = "test/rewards/accuracies"


def fit_resume_and_test(lab: Lab, *logger: str) -> Run:
    """Train two steps, resume for two more, and test."""
    assert lab.main("fit", "--trainer.max_steps=2", *OPTIONS, *logger) == 0
    assert lab.main("fit", "--trainer.max_steps=4", *OPTIONS, *logger, "--ckpt_path=last") == 0
    assert lab.main("test", *OPTIONS[1:], *logger, "--ckpt_path=last") == 0
    return Run(lab.folder / "one")


def curve(run: Run, name: str) -> dict[int, float]:
    """Return the values of a metric by step, from metrics.csv."""
    return {int(row["step"]): row[name] for row in metrics(run) if name in row}


def samples(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.samples_path.read_text().splitlines()]


def validation_margins(run: Run, step: int) -> list[float]:
    """Return the margins of the validation pairs at a step, from the ledger."""
    (path,) = run.ledger_path.glob(f"step-{step:08}-*measured*.parquet")
    rows = pq.read_table(path)
    return (rows["chosen_reward"].to_numpy() - rows["rejected_reward"].to_numpy()).tolist()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = ("--trainer.logger=TensorBoardLogger", f"--trainer.logger.save_dir={tmp_path / 'board'}")
    run = fit_resume_and_test(Lab(tmp_path / "runs"), *logger)
    (folder,) = (tmp_path / "board" / "lightning_logs").iterdir()
    assert folder.name == "one", "one run of TensorBoard per run, by its name"
    board = EventAccumulator(str(folder), size_guidance={"histograms": 0, "tensors": 0})
    board.Reload()
    for name in ("train/loss", "val/loss", "val/rewards/margins"):
        logged = {event.step: event.value for event in board.Scalars(name)}
        assert logged == pytest.approx(curve(run, name)), name
    assert list(curve(run, "train/loss")) == [1, 2, 3, 4]
    (result,) = board.Scalars(RESULTS)
    assert (result.step, result.value) == (4, pytest.approx(json.loads(run.results_path.read_text())[RESULTS]))
    margins = {event.step: event.histogram_value for event in board.Histograms("val/margins_of_pairs")}
    assert list(margins) == [2, 4]
    for step, histogram in margins.items():
        expected = validation_margins(run, step)
        assert (histogram.num, histogram.sum) == (len(expected), pytest.approx(sum(expected)))
    texts = {event.step: event.tensor_proto.string_val[0].decode() for event in board.Tensors("samples/text_summary")}
    assert list(texts) == [2, 4]
    for row in samples(run):
        assert "How is" in row["prompt"] and texts[row["step"]].count("How is") == len(samples(run)) / 2
    configuration = yaml.safe_load((folder / "hparams.yaml").read_text())
    assert configuration["model"]["init_args"]["policy"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)  # where MLflow keeps files of runs
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    logger = ("--trainer.logger=MLFlowLogger", f"--trainer.logger.tracking_uri={address}")
    run = fit_resume_and_test(Lab(tmp_path / "runs"), *logger)
    client = MlflowClient(address)
    (logged,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert (logged.info.run_name, logged.info.status) == ("one", "FINISHED")
    for name in ("train/loss", "val/loss"):
        history = {each.step: each.value for each in client.get_metric_history(logged.info.run_id, name)}
        assert history == pytest.approx(curve(run, name)), name
    assert logged.data.metrics[RESULTS] == pytest.approx(json.loads(run.results_path.read_text())[RESULTS])
    assert logged.data.params["model/init_args/policy"]
    (table,) = client.list_artifacts(logged.info.run_id, "")
    assert table.path == "samples.json"
    rows = json.loads(Path(client.download_artifacts(logged.info.run_id, table.path)).read_text())
    assert [dict(zip(rows["columns"], row, strict=True)) for row in rows["data"]] == samples(run)


def wandb_records(path: Path) -> Iterator[Record]:
    """Read the file of an offline run: a header, then blocks of 32 KB in which records are cut into fragments."""
    content, block, record = path.read_bytes(), 32_768, b""
    assert content[:4] == b":W&B"
    place = 7
    while place + 7 <= len(content):
        if block - place % block < 7:  # no room for the head of a fragment: the rest of the block is empty
            place += block - place % block
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the whole, or the last fragment
            yield Record.FromString(record)
            record = b""


def nested(values: dict[tuple[str, ...], str]) -> dict[str, Any]:
    """Return values as dictionaries in dictionaries, from JSON by the keys that lead to each."""
    result: dict[str, Any] = {}
    for (*outer, last), value in values.items():
        place = result
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(value)
    return result


def test_weights_and_biases_offline(tmp_path: Path) -> None:
    lab, run = Lab(tmp_path), Run(tmp_path / "one")
    process = lab.start("fit", "--trainer.max_steps=4", *OPTIONS, WANDB_MODE="offline")
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    (path,) = (run.folder / "wandb").glob("offline-run-*/run-*.wandb")
    records = [*wandb_records(path)]
    history: list[dict[str, Any]] = []
    for record in records:
        if record.HasField("history"):
            history.append(nested({tuple(i.nested_key) or (i.key,): i.value_json for i in record.history.item}))
    for name in ("train/loss", "val/loss", "val/rewards/margins"):
        logged = {row["trainer/global_step"]: row[name] for row in history if name in row}
        assert logged == pytest.approx(curve(run, name)), name
    tables = [row["samples"] for row in history if "samples" in row]
    assert [table["_type"] for table in tables] == ["table-file"] * 2
    table = json.loads((path.parent / "files" / tables[-1]["path"]).read_text())
    expected = [[*row.values()] for row in samples(run) if row["step"] == 4]
    assert table["columns"] == list(samples(run)[0]) and table["data"] == expected
    histograms = {
        row["trainer/global_step"]: row["val/margins_of_pairs"] for row in history if "val/margins_of_pairs" in row
    }
    assert list(histograms) == [2, 4]
    for step, histogram in histograms.items():
        margins = validation_margins(run, step)
        assert sum(histogram["values"]) == len(margins)
        assert (histogram["bins"][0], histogram["bins"][-1]) == pytest.approx((min(margins), max(margins)))
    artifacts = {record.request.log_artifact.artifact.type for record in records if record.HasField("request")}
    artifacts |= {record.artifact.type for record in records if record.HasField("artifact")}
    assert ("report" in artifacts) == run.report_path.is_file()

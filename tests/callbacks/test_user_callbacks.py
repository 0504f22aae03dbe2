"""Callbacks, profilers and loggers of Lightning that a user adds on the command line."""

import csv
from pathlib import Path

import pytest

from tests.support.runs import Lab, metrics

QUICK = ["--trainer.max_steps=2", "--data.val_fraction=0"]
VALIDATED = ["--trainer.val_check_interval=2", "--trainer.max_steps=8", "--trainer.check_val_every_n_epoch=null"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("runs"))


def callback(name: str, **options: object) -> str:
    given = ", ".join(f"{key}: {value}" for key, value in options.items())
    return f"--trainer.callbacks=[{{class_path: {name}, init_args: {{{given}}}}}]"


def test_checkpoints_of_the_user_lie_beside_those_of_the_run(lab: Lab) -> None:
    own = callback("ModelCheckpoint", every_n_train_steps=1, save_top_k=-1, filename="'own-{step}'")
    run = lab.fit("saved", *QUICK, own)
    saved = {path.name for path in run.checkpoint_folder.iterdir() if path.suffix == ".ckpt"}
    assert saved == {"last.ckpt", "own-step=1.ckpt", "own-step=2.ckpt"}
    assert not (run.folder / "csv").exists()
    lab.fit("saved", *QUICK[1:], "--trainer.max_steps=3", own, "--ckpt_path=last")
    assert (run.checkpoint_folder / "own-step=3.ckpt").exists()


def test_the_best_checkpoints_by_a_metric_are_kept(lab: Lab) -> None:
    run = lab.fit("monitored", *VALIDATED, callback("ModelCheckpoint", monitor="val/loss", filename="least"))
    assert (run.checkpoint_folder / "least.ckpt").exists()


def test_learning_rates_are_logged_at_optimizer_steps(lab: Lab) -> None:
    rows = metrics(lab.fit("rates", *QUICK, callback("LearningRateMonitor", logging_interval="step")))
    # Lightning's callbacks count the steps before, from 0.
    assert {row["step"]: row["lr-AdamW"] for row in rows if "lr-AdamW" in row} == {0: 1e-6, 1: 1e-6}


def test_training_stops_early(lab: Lab) -> None:
    stop = callback("EarlyStopping", monitor="val/loss", patience=1, min_delta=10.0)
    rows = metrics(lab.fit("stopped", *VALIDATED, stop))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert "val/loss" in rows[-1]


@pytest.mark.parametrize(
    ("profiler", "file"), [("SimpleProfiler", "fit-times.txt"), ("AdvancedProfiler", "fit-times.txt")]
)
def test_profilers_write_into_the_folder_of_the_run(lab: Lab, profiler: str, file: str) -> None:
    words = [f"--trainer.profiler={profiler}", "--trainer.profiler.filename=times"]
    run = lab.fit(profiler, *QUICK, *words)
    assert "optimizer_step" in (run.folder / file).read_text()


@pytest.mark.parametrize("options", [{"swa_lrs": 0.01}])
def test_averaging_of_weights_is_refused_by_name(
    lab: Lab, capsys: pytest.CaptureFixture[str], options: dict[str, float]
) -> None:
    for name, given in (("StochasticWeightAveraging", options), ("WeightAveraging", {})):
        assert lab.main("fit", "--name=averaged", *QUICK, callback(name, **given)) == 1
        assert f"--trainer.callbacks: expected none that averages weights, got {name}" in capsys.readouterr().err
        assert not (lab.folder / "averaged").exists()


def test_a_logger_of_the_user_gets_values_at_optimizer_steps(lab: Lab, tmp_path: Path) -> None:
    words = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}", "--trainer.logger.version=1"]
    run = lab.fit("logged", "--trainer.max_steps=4", "--data.val_fraction=0", *words, "--trainer.logger.name=x",
                  "--trainer.accumulate_grad_batches=2")  # fmt: skip
    with (tmp_path / "x" / "version_1" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert [float(row["train/loss"]) for row in rows] == pytest.approx([row["train/loss"] for row in metrics(run)])


def test_every_row_of_metrics_says_epoch_and_seconds(lab: Lab) -> None:
    options = ["--data.val_fraction=0", "--trainer.max_steps"]
    run = lab.fit("clock", *options, "3")
    header = run.metrics_path.read_text().splitlines()[0]
    assert header.startswith("step,epoch,seconds,train/")
    before = metrics(run)[-1]["seconds"]
    lab.fit("clock", *options, "9", "--ckpt_path=last")
    rows = metrics(run)
    assert run.metrics_path.read_text().splitlines()[0] == header
    assert [row["epoch"] for row in rows] == [round(step / 6, 4) for step in range(1, 10)]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds) and seconds[2] == before > 0

"""metrics.csv: one row per step in any order of calls, and nothing lost; Weights & Biases offline."""

import csv
import errno
from pathlib import Path

import pytest

from dpo.runs.loggers import MetricsCSV, read_metrics
from tests.support.runs import Lab


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_values_of_one_step_share_a_row(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path / "metrics.csv")
    log.log_metrics({"train/loss": 0.5}, step=1)
    log.log_metrics({"train/time": 2.0}, step=1)
    log.log_metrics({"train/loss": 0.25, "train/time": 3.0}, step=2)
    log.log_metrics({"val/loss": 0.75}, step=2)
    assert rows(log.path) == [
        {"step": "1", "train/loss": "0.5", "train/time": "2.0", "val/loss": ""},
        {"step": "2", "train/loss": "0.25", "train/time": "3.0", "val/loss": "0.75"},
    ]


def test_a_full_disk_stops_the_run_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = csv.DictWriter.writerow

    def write_until_full(writer: csv.DictWriter, row: dict[str, object]) -> object:
        if row.get("step") == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(writer, row)

    monkeypatch.setattr(csv.DictWriter, "writerow", write_until_full)
    options = ["--data.val_fraction=0", "--trainer.log_every_n_steps=1", "--trainer.max_steps=4"]
    assert Lab(tmp_path).main("fit", "--name=full", *options) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'full' / 'metrics.csv'}: No space left on device (")
    assert "MiB are free there). Free some space, or choose another folder with --trainer.default_root_dir" in last
    assert [row["step"] for row in rows(tmp_path / "full" / "metrics.csv")] == ["1", "2"]


def test_columns_keep_the_order_of_their_first_appearance(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path / "metrics.csv")
    for step, name in enumerate(["b", "a", "c", "a"], start=1):
        log.log_metrics({name: 1.0}, step=step)
    assert log.path.read_text().splitlines()[0] == "step,b,a,c"


def test_every_row_is_written_to_disk_at_once(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path / "metrics.csv")
    for step in range(1, 5):
        log.log_metrics({"train/loss": step / 8}, step=step)
        assert [row["train/loss"] for row in rows(log.path)] == [str(n / 8) for n in range(1, step + 1)]


def log_steps(path: Path, steps: range) -> MetricsCSV:
    log = MetricsCSV(path)
    for step in steps:
        log.log_metrics({"train/loss": float(step)}, step=step)
    return log


@pytest.mark.parametrize("more", [{}, {"val/loss": 4.5}])
def test_a_resumed_run_replaces_the_rows_of_repeated_steps(tmp_path: Path, more: dict[str, float]) -> None:
    path = log_steps(tmp_path / "metrics.csv", range(1, 6)).path
    resumed = MetricsCSV(path)
    resumed.rewind_to_step(3)
    assert [row["step"] for row in rows(path)] == ["1", "2", "3"]
    resumed.log_metrics({"lr": 0.1}, step=3)  # from a callback, before the first repeated step
    resumed.log_metrics({"train/loss": 40.0, **more}, step=4)
    assert rows(path) == [
        {"step": "1", "train/loss": "1.0", "lr": "", **dict.fromkeys(more, "")},
        {"step": "2", "train/loss": "2.0", "lr": "", **dict.fromkeys(more, "")},
        {"step": "3", "train/loss": "3.0", "lr": "0.1", **dict.fromkeys(more, "")},
        {"step": "4", "train/loss": "40.0", "lr": "", **{name: str(value) for name, value in more.items()}},
    ]


@pytest.mark.parametrize("step", [3, 4])
def test_a_checkpoint_between_logged_steps_adds_no_row(tmp_path: Path, step: int) -> None:
    path = log_steps(tmp_path / "metrics.csv", range(1, 4)).path
    before = path.read_text()
    MetricsCSV(path).rewind_to_step(step)
    assert path.read_text() == before


def test_rewinding_to_the_start_leaves_no_row(tmp_path: Path) -> None:
    path = log_steps(tmp_path / "metrics.csv", range(1, 4)).path
    log = MetricsCSV(path)
    log.rewind_to_step(0)
    assert rows(path) == []
    log.log_metrics({"train/loss": 9.0}, step=1)
    assert rows(path) == [{"step": "1", "train/loss": "9.0"}]


def test_rewinding_a_new_run_does_nothing(tmp_path: Path) -> None:
    MetricsCSV(tmp_path / "metrics.csv").rewind_to_step(0)
    assert not list(tmp_path.iterdir())


def test_an_earlier_step_is_added_to_the_last_row(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path / "metrics.csv")
    log.log_metrics({"lr": 0.1}, step=0)
    log.log_metrics({"train/loss": 1.0}, step=1)
    log.log_metrics({"memory": 7.0}, step=0)  # the end of the first step, as Lightning's callbacks count
    log.log_metrics({"train/time": 2.0}, step=1)
    assert [[*row.values()] for row in rows(log.path)] == [["0", "0.1", "", "", ""], ["1", "", "1.0", "7.0", "2.0"]]


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.csv") == []


def test_without_an_api_key_weights_and_biases_is_offline_and_prints_how_to_sync(tmp_path: Path) -> None:
    """In a separate process, because wandb keeps its settings until the process ends."""
    no_login = {"HOME": str(tmp_path / "home"), "NETRC": str(tmp_path / "home" / ".netrc")}
    process = Lab(tmp_path).start(
        *("fit", "--name=one", "--trainer.max_steps=2", "--data.val_fraction=0"),
        **{**no_login, "WANDB_MODE": None, "WANDB_SILENT": None},
    )
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    folder = tmp_path / "one" / "wandb"
    assert f"wandb sync {folder}/offline-run-*" in printed
    (run,) = folder.glob("offline-run-*")
    assert list(run.glob("*.wandb"))
    for noise in ("warn", "deprecated", "tip", "Loading weights", "Writing model", "weights_only", "Traceback"):
        assert noise not in printed.lower() and noise not in printed

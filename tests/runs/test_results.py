"""The table of results of a metrics.csv."""

import csv
from pathlib import Path

import pytest

from dpo.runs import results
from dpo.runs.card import model_card
from dpo.runs.folder import Run
from dpo.runs.loggers import MetricsCSV

SIDES = [f"{what}/{side}" for what in ("rewards", "logps", "logits") for side in ("chosen", "rejected")]
PAIRS = (*SIDES, "rewards/accuracies", "rewards/margins")


def values(stage: str, loss: float) -> dict[str, float]:
    """Distinct values: with loss 0.5, rewards/chosen is 0.501, the next metric 0.502, and so on."""
    return {f"{stage}/loss": loss} | {f"{stage}/{name}": loss + (i + 1) / 1000 for i, name in enumerate(PAIRS)}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Four steps; every second one is logged, with validations at steps 3 and 4."""
    log = MetricsCSV(tmp_path / "metrics.csv")
    log.log_metrics(values("train", 0.8), step=2)
    log.log_metrics(values("val", 0.7), step=3)
    log.log_metrics(values("train", 0.6), step=4)
    log.log_metrics(values("val", 0.5), step=4)
    return Run(tmp_path)


HEADER = ("step", "training loss", "validation loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies")
HEADER += ("rewards/margins", "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected")


def test_a_row_has_a_validation_and_the_last_training_loss_before_it(run: Run) -> None:
    header, *rows = results.results_table(run.metrics_path)
    assert header == HEADER
    assert [row[:4] for row in rows] == [("3", "0.8", "0.7", "0.701"), ("4", "0.6", "0.5", "0.501")]
    expected = {name: 0.5 + (i + 1) / 1000 for i, name in enumerate(PAIRS)}
    assert [float(value) for value in rows[1][3:]] == pytest.approx([expected[name] for name in header[3:]])


def test_the_table_is_written_as_csv_and_markdown(run: Run) -> None:
    rows = results.write_results(run)
    with (run.folder / "results.csv").open(newline="") as file:
        assert [tuple(row) for row in csv.reader(file)] == rows
    lines = (run.folder / "results.md").read_text().splitlines()
    assert lines[0] == f"| {' | '.join(HEADER)} |"
    assert lines[2].startswith("| 3 | 0.8000 | 0.7000 | 0.7010 |")
    assert {line.count("|") for line in lines} == {len(HEADER) + 1}
    assert len(lines) == 2 + 2


def test_without_validation_the_rows_are_the_logged_steps(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path / "metrics.csv")
    for step in (10, 20):
        log.log_metrics(values("train", step / 100), step=step)
    header, *rows = results.results_table(log.path)
    assert header == HEADER
    assert [row[:4] for row in rows] == [("10", "0.1", "", "0.101"), ("20", "0.2", "", "0.201")]


def test_a_run_that_logged_nothing_has_an_empty_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = results.write_results(Run(tmp_path))
    assert len(rows) == 1
    results.print_results(rows, "Results")
    assert "Results" in capsys.readouterr().out


@pytest.mark.parametrize("width", ["60", "100", "200"])
def test_every_number_is_shown_at_any_width(
    run: Run, width: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    results.print_results(results.results_table(run.metrics_path), "Results of one")
    printed = capsys.readouterr().out
    assert "Results of one" in printed and "…" not in printed
    for number in ("0.8000", "0.7010", "0.6000", *(f"{0.5 + (i + 1) / 1000:.4f}" for i in range(len(PAIRS)))):
        assert number in printed


def test_steps_after_the_last_validation_are_remarked(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert not list(results.results_remarks(run.metrics_path))
    log = MetricsCSV(run.metrics_path)
    log.rewind_to_step(4)
    log.log_metrics(values("train", 0.4), step=5)
    remark = "The last validation was at step 4, the policy is that of step 5."
    assert list(results.results_remarks(run.metrics_path)) == [remark]
    results.print_results(results.write_results(run), "Results of one", results.results_remarks(run.metrics_path))
    assert remark in capsys.readouterr().out
    assert remark in (run.folder / "results.md").read_text()
    assert remark in str(model_card(run, "base", "data", "story"))


@pytest.mark.parametrize("stage", ["train", "val"])
def test_ties_are_remarked(tmp_path: Path, stage: str) -> None:
    log = MetricsCSV(tmp_path / "metrics.csv")
    log.log_metrics(values(stage, 0.7) | {f"{stage}/rewards/{name}": 0.0 for name in ("accuracies", "margins")}, step=1)
    log.log_metrics(values(stage, 0.6) | {f"{stage}/rewards/accuracies": 0.0}, step=2)
    (remark,) = results.results_remarks(log.path)
    assert remark == "At step 1 policy and reference are equal: every pair is a tie, and counts as 0."

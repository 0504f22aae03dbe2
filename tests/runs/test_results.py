"""The table of results, from a metrics.csv that is written here."""

import csv
from pathlib import Path

import pytest

from dpo.runs import results
from dpo.runs.export import model_card
from dpo.runs.folder import Run
from dpo.runs.loggers import MetricsCSV

SIDES = [f"{what}/{side}" for what in ("rewards", "logps", "logits") for side in ("chosen", "rejected")]
PAIRS = (*SIDES, "rewards/accuracies", "rewards/margins")


def values(stage: str, loss: float) -> dict[str, float]:
    """Numbers that tell their places: loss 0.5 has rewards/chosen 0.501, and so on."""
    return {f"{stage}/loss": loss} | {f"{stage}/{name}": loss + (i + 1) / 1000 for i, name in enumerate(PAIRS)}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Four steps, of which every second is logged, validated at 3 and 4."""
    log = MetricsCSV(tmp_path / "metrics.csv")
    log.log_metrics(values("train", 0.8), step=2)
    log.log_metrics(values("val", 0.7), step=3)
    log.log_metrics(values("train", 0.6), step=4)
    log.log_metrics(values("val", 0.5), step=4)
    return Run(tmp_path)


TEN = ("step", "training loss", "validation loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies")
TEN += ("rewards/margins", "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected")


def test_a_row_is_a_validation_and_the_last_training_loss_before(run: Run) -> None:
    header, *rows = results.results_table(run.metrics_path)
    assert header == TEN
    assert [row[:4] for row in rows] == [("3", "0.8", "0.7", "0.701"), ("4", "0.6", "0.5", "0.501")]
    place = {name: 0.5 + (i + 1) / 1000 for i, name in enumerate(PAIRS)}
    assert [float(value) for value in rows[1][3:]] == pytest.approx([place[name] for name in header[3:]])


def test_it_is_written_as_csv_and_markdown(run: Run) -> None:
    rows = results.write_results(run)
    with (run.folder / "results.csv").open(newline="") as file:
        assert [tuple(row) for row in csv.reader(file)] == rows
    lines = (run.folder / "results.md").read_text().splitlines()
    assert lines[0] == f"| {' | '.join(TEN)} |"
    assert lines[2].startswith("| 3 | 0.8000 | 0.7000 | 0.7010 |")
    assert {line.count("|") for line in lines} == {len(TEN) + 1}
    assert len(lines) == 2 + 2


def test_without_validation_the_rows_are_the_logged_steps(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path / "metrics.csv")
    for step in (10, 20):
        log.log_metrics(values("train", step / 100), step=step)
    header, *rows = results.results_table(log.path)
    assert header == TEN
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
    shown = capsys.readouterr().out
    assert "Results of one" in shown and "…" not in shown
    for number in ("0.8000", "0.7010", "0.6000", *(f"{0.5 + (i + 1) / 1000:.4f}" for i in range(len(PAIRS)))):
        assert number in shown


def test_a_policy_that_trained_on_behind_the_last_validation_is_said(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not list(results.results_remarks(run.metrics_path))
    log = MetricsCSV(run.metrics_path)
    log.rewind_to_step(4)
    log.log_metrics(values("train", 0.4), step=5)
    said = "The last validation was at step 4, the policy is that of step 5."
    assert list(results.results_remarks(run.metrics_path)) == [said]
    results.print_results(results.write_results(run), "Results of one", results.results_remarks(run.metrics_path))
    assert said in capsys.readouterr().out
    assert said in (run.folder / "results.md").read_text()
    assert said in str(model_card(run, "base", "data", "story"))


@pytest.mark.parametrize("stage", ["train", "val"])
def test_ties_are_said(tmp_path: Path, stage: str) -> None:
    log = MetricsCSV(tmp_path / "metrics.csv")
    log.log_metrics(values(stage, 0.7) | {f"{stage}/rewards/{name}": 0.0 for name in ("accuracies", "margins")}, step=1)
    log.log_metrics(values(stage, 0.6) | {f"{stage}/rewards/accuracies": 0.0}, step=2)
    (said,) = results.results_remarks(log.path)
    assert said == "At step 1 policy and reference are equal: every pair is a tie, and counts as 0."

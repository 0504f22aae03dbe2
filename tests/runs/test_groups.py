"""Groups of pairs: values by hand, what is printed and stored, and metrics of subsets that callbacks watch."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dpo.cli.compare import summarize_run
from dpo.runs.folder import Run
from dpo.runs.groups import PairGroup, groups_as_json, measure_groups, print_groups, subset_means
from dpo.runs.intervals import mean_interval
from dpo.runs.ledger import LEDGER_SCHEMA, read_ledger
from dpo.runs.results import read_artifacts, result_values
from tests.support.runs import Lab, checkpoint, metrics, pairs


def table(**columns: list[object]) -> pa.Table:
    """Rows of a ledger with these columns; the others are 0 or alike."""
    count = len(next(iter(columns.values())))
    default = {pa.string(): "x", pa.bool_(): False}
    filled = {field.name: columns.get(field.name, [default.get(field.type, 0)] * count) for field in LEDGER_SCHEMA}
    return pa.table(filled, LEDGER_SCHEMA)


PAIRS = table(
    subset=["a", "a", "a", "b", "b", "b"],
    turns=[1, 2, 3, 4, 5, 9],
    chosen_tokens=[5, 5, 9, 5, 5, 5],
    rejected_tokens=[7, 7, 5, 5, 9, 9],
    chosen_reward=[1.0, 0.0, 2.0, 1.0, 0.0, 0.5],
    rejected_reward=[0.0, 0.0, 3.0, 0.0, 1.0, 0.0],  # right, tied, wrong, right, wrong, right
    reference_chosen_logp=[-1.0, -2.0, -3.0, -4.0, -5.0, -6.0],
    reference_rejected_logp=[-2.0, -2.0, -2.0, -5.0, -6.0, -7.0],  # right, tied, wrong, right, right, right
    loss=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
)


def group(by: str, name: str, rows: pa.Table = PAIRS) -> PairGroup:
    [found] = [each for each in measure_groups(rows) if (each.by, each.name) == (by, name)]
    return found


def test_accuracy_loss_and_baselines_are_those_of_the_pairs() -> None:
    everything = group("all", "pairs")
    assert everything.pairs == 6
    assert everything.accuracy.value == pytest.approx(3 / 6)  # a tie is no win
    assert everything.loss.value == pytest.approx(2.1 / 6)
    assert everything.longer.value == pytest.approx((1 + 0.5) / 6)  # one is longer, one is as long
    assert everything.reference is not None and everything.reference.value == pytest.approx(4 / 6)
    rule, shorter = everything.length_baseline
    assert (rule, shorter.value) == ("shorter", pytest.approx(4.5 / 6))
    assert shorter.low == pytest.approx(1 - everything.longer.high) and shorter.low <= shorter.value <= shorter.high


@pytest.mark.parametrize(
    ("by", "name", "members"),
    [
        ("subset", "a", [0, 1, 2]),
        ("subset", "b", [3, 4, 5]),
        ("turns", "1", [0]),
        ("turns", "2", [1]),
        ("turns", "3-4", [2, 3]),
        ("turns", "5+", [4, 5]),
        ("tokens longer", "-4 to -4", [4, 5]),
        ("tokens longer", "-2 to -2", [0, 1]),
        ("tokens longer", "0 to 0", [3]),
        ("tokens longer", "4 to 4", [2]),
    ],
)
def test_every_group_has_its_pairs(by: str, name: str, members: list[int]) -> None:
    found = group(by, name)
    losses = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])[members]
    right = np.array([1, 0, 0, 1, 0, 1])[members]
    assert (found.pairs, found.accuracy.value) == (len(members), pytest.approx(right.mean()))
    low, high = mean_interval(losses)
    measured = (found.loss.value, found.loss.low, found.loss.high)
    assert measured == pytest.approx((losses.mean(), low, high), abs=1e-6)


def test_buckets_of_length_hold_about_as_many_pairs() -> None:
    many = table(chosen_tokens=list(range(1, 1001)), rejected_tokens=[100] * 1000)
    sizes = [each.pairs for each in measure_groups(many) if each.by == "tokens longer"]
    assert len(sizes) == 5 and sum(sizes) == 1000 and max(sizes) - min(sizes) <= 2


def test_the_order_of_the_pairs_does_not_matter() -> None:
    """Processes come in any order."""
    assert measure_groups(PAIRS.take([5, 3, 1, 0, 2, 4])) == measure_groups(PAIRS)


def test_without_a_reference_there_is_no_baseline_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    nothing = [None] * 6
    free = PAIRS.drop_columns(["reference_chosen_logp", "reference_rejected_logp"])
    for name in ("reference_chosen_logp", "reference_rejected_logp"):
        free = free.append_column(name, pa.array(nothing, pa.float32()))
    groups = measure_groups(free)
    assert {each.reference for each in groups} == {None}
    print_groups(groups)
    assert "log-probability - %" in capsys.readouterr().out


def test_no_pairs_have_no_groups(capsys: pytest.CaptureFixture[str]) -> None:
    print_groups(measure_groups(PAIRS.slice(0, 0)))
    assert capsys.readouterr().out == "" and not subset_means(PAIRS.slice(0, 0))


def test_the_table_fits_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    large = table(subset=["helpful-rejection-sampled", "b"] * 600, loss=[1.0, 2.0] * 600, turns=[1, 6] * 600)
    print_groups(measure_groups(large))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    row = next(line.split() for line in lines if line.startswith("pairs"))
    assert row[:4] == ["pairs", "1200", "0.0", "[0.0,"] and row[-2:] == ["50.0", "0.0"]


def test_no_value_is_cut_at_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every share is 100 %, the longest that there is."""
    monkeypatch.setenv("COLUMNS", "80")
    values = {"chosen_reward": 1.0, "chosen_tokens": 9, "reference_chosen_logp": 1.0, "loss": 0.5}
    right = table(subset=["a"] * 9, **{name: [value] * 9 for name, value in values.items()})
    print_groups(measure_groups(right))
    printed = capsys.readouterr().out
    assert "\u2026" not in printed
    row = next(line.split() for line in printed.splitlines() if line.startswith("pairs"))
    assert row == ["pairs", "9", "100.0", "[100.0,", "100.0]", "0.500", "[0.500,", "0.500]", "100.0", "100.0"]


def test_groups_are_values_of_json() -> None:
    first = json.loads(json.dumps(groups_as_json(measure_groups(PAIRS)), allow_nan=False))[0]
    assert first["accuracy"]["value"] == 0.5 and first["length_baseline"] == "shorter"


def test_subsets_have_means_of_their_own_only_if_there_are_several() -> None:
    means = subset_means(PAIRS)
    assert means["loss/a"] == pytest.approx(0.2) and means["rewards/accuracies/b"] == pytest.approx(2 / 3)
    assert means["rewards/margins/a"] == pytest.approx((1 + 0 - 1) / 3)
    assert not subset_means(PAIRS.slice(0, 3))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def two_subsets(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Data of two subsets, the second of which has its answers exchanged."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(pairs() / "pairs", folder / "good")
    (folder / "bad").mkdir()
    for source in (folder / "good").iterdir():
        with gzip.open(source, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        with gzip.open(folder / "bad" / source.name, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"chosen": r["rejected"], "rejected": r["chosen"]}) + "\n" for r in rows)
    return f"--data.path={folder}"


WATCHED = "val/rewards/margins/good"
CADENCE = ["--optimizer.lr=1e-3", "--trainer.val_check_interval=2", "--trainer.max_steps=6"]


@pytest.fixture(scope="module")
def watched(lab: Lab, two_subsets: str) -> Run:
    monitor = [f"--checkpoint.monitor={WATCHED}", "--checkpoint.mode=max"]
    return lab.fit("watched", two_subsets, *CADENCE, *monitor)


def test_metrics_of_subsets_are_those_of_the_ledger(watched: Run) -> None:
    logged = {row["step"]: row for row in metrics(watched)}
    rows = [row for row in read_ledger(watched).to_pylist() if row["split"] == "val"]
    assert {row["step"] for row in rows} == {2, 4, 6}
    for step in (2, 4, 6):
        for subset in ("good", "bad"):
            of_subset = [row for row in rows if (row["step"], row["subset"]) == (step, subset)]
            right = [row["chosen_reward"] > row["rejected_reward"] for row in of_subset]
            assert logged[step][f"val/rewards/accuracies/{subset}"] == pytest.approx(sum(right) / len(right))
            losses = [row["loss"] for row in of_subset]
            assert logged[step][f"val/loss/{subset}"] == pytest.approx(sum(losses) / len(losses), abs=1e-6)


def test_best_is_by_the_metric_that_was_named(watched: Run) -> None:
    margins = {row["step"]: row[WATCHED] for row in metrics(watched) if WATCHED in row}
    assert checkpoint(watched, "best")["global_step"] == max(margins, key=margins.__getitem__)


def test_callbacks_watch_metrics_of_subsets(lab: Lab, two_subsets: str) -> None:
    stop = "{class_path: EarlyStopping, init_args: {monitor: val/loss/bad, patience: 1, min_delta: 9.0}}"
    keep = f"{{class_path: ModelCheckpoint, init_args: {{monitor: {WATCHED}, mode: max, filename: mine}}}}"
    run = lab.fit("stopped", two_subsets, *CADENCE, f"--trainer.callbacks=[{stop}, {keep}]")
    margins = {row["step"]: row[WATCHED] for row in metrics(run) if WATCHED in row}
    assert sorted(margins) == [2, 4]  # stopped: no loss is 9 lower than the first
    assert checkpoint(run, "mine")["global_step"] == max(margins, key=margins.__getitem__)


def test_results_hold_the_groups_and_their_readers_read_on(watched: Run, lab: Lab, two_subsets: str, capsys) -> None:
    assert lab.main("test", "--name=watched", "--ckpt_path=last", two_subsets) == 0
    printed = capsys.readouterr().out
    assert "by tokens longer" in printed and "Baselines: the " in printed
    stored = json.loads(watched.results_path.read_text())
    assert [each["name"] for each in stored["val_groups"] if each["by"] == "subset"] == ["bad", "good"]
    everything = stored["test_groups"][0]
    assert everything["pairs"] == 12 and everything["loss"]["value"] == pytest.approx(stored["test/loss"], abs=1e-6)
    assert everything["accuracy"]["value"] == pytest.approx(stored["test/rewards/accuracies"])
    assert everything["longer"]["value"] == 0.5  # of every pair there is one the other way round
    numbers = {name: value for name, value in stored.items() if "groups" not in name}
    assert read_artifacts(watched)["values"] == numbers == result_values(watched)
    assert summarize_run(watched.folder).values["test loss"] == stored["test/loss"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--checkpoint.monitor=val/loss/ugly", "--checkpoint.mode=min"], "--checkpoint.monitor: LastAndBest watches"),
        (["--checkpoint.monitor=val/los", "--checkpoint.mode=min"], "Did you mean val/loss?"),
        (["--checkpoint.monitor=train/loss", "--checkpoint.mode=min"], "expected a metric of the validations (val/"),
        (["--checkpoint.monitor=val/rewards/margins"], "--checkpoint.mode: expected min or max beside"),
        (
            ["--checkpoint.monitor=val/entropy", "--checkpoint.mode=min", "--data.val_fraction=0"],
            "expected validations",
        ),
        (
            ["--trainer.callbacks=[{class_path: EarlyStopping, init_args: {monitor: val/rewards/accuracies/ugly}}]"],
            "--trainer.callbacks: EarlyStopping watches 'val/rewards/accuracies/ugly', expected one of val/loss",
        ),
    ],
)
def test_metrics_that_are_not_logged_are_refused(
    lab: Lab, two_subsets: str, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    assert lab.main("fit", "--name=refused", two_subsets, *CADENCE, *words) == 1
    assert expected in capsys.readouterr().err
    assert not (lab.folder / "refused").exists()


def test_best_starts_anew_where_another_metric_is_watched(lab: Lab, watched: Run, two_subsets: str) -> None:
    again = ["--trainer.max_steps=8", "--ckpt_path=last", two_subsets, "--optimizer.lr=1e-3"]
    lab.fit("watched", *again, "--trainer.val_check_interval=2")
    losses = {row["step"]: row["val/loss"] for row in metrics(watched) if "val/loss" in row and row["step"] > 6}
    assert checkpoint(watched, "best")["global_step"] == min(losses, key=losses.__getitem__)


def test_a_file_of_results_without_groups_is_read(tmp_path: Path) -> None:
    Run(tmp_path).results_path.write_text('{"val/loss": 0.5}')
    assert result_values(Run(tmp_path)) == {"val/loss": 0.5}

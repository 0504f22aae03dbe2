"""A run through the command line: the files in its folder, the first steps of training, and its lock."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo.files import append_jsonl, drop_rows_from_step, write_atomically
from dpo.runs.folder import Run
from dpo.runs.results import result_values
from tests.support.runs import Lab, checkpoint, metrics, policy, weights

SIDES = [f"{what}/{side}" for what in ("rewards", "logps", "logits", "length") for side in ("chosen", "rejected")]
PAIR_METRICS = {*SIDES, "loss", "rewards/margins", "rewards/accuracies", "displaced"}
PAIR_METRICS |= {"entropy", "token_accuracy", "nll/chosen"}
RATES = {"tokens_per_second", "time/step", "time/data", "learning_rate", "grad_norm"}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def run(lab: Lab) -> Run:
    """Six steps of four pairs in two epochs, with a validation every second step."""
    return lab.fit("one", "--trainer.max_steps=6", "--trainer.val_check_interval=2", "--optimizer.lr=1e-3")


def test_all_files_of_a_run_are_in_its_folder(run: Run, lab: Lab) -> None:
    assert {path.name for path in run.folder.iterdir()} == {
        "config.yaml",
        "metrics.csv",
        "results.json",
        "results.md",
        "results.csv",
        "ledger.parquet",
        "samples.jsonl",
        "held_out.jsonl",
        "audit.json",
        "checkpoints",
        "export",
    }
    assert {path.name for path in run.checkpoint_folder.iterdir()} == {
        f"{name}.ckpt{end}" for name in ("last", "last-1", "best") for end in ("", ".sha256")
    }
    assert sorted(path.name for path in lab.folder.iterdir()) == ["latest", "one"]
    assert (lab.folder / "latest").resolve() == run.folder


def test_metrics_have_one_row_per_step(run: Run) -> None:
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert {f"train/{name}" for name in PAIR_METRICS | RATES} <= row.keys()
        validated = row["step"] in (2, 4, 6)  # every second batch of an epoch of five, and the last step
        assert {name for name in row if name.startswith("val/")} == {f"val/{n}" for n in PAIR_METRICS if validated}


def test_the_first_loss_is_log_2_and_the_first_rewards_are_0(run: Run) -> None:
    first = metrics(run)[0]  # measured before the first update of the weights
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-7)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "displaced"):
        assert first[f"train/{name}"] == 0.0


def test_training_lowers_the_loss(run: Run) -> None:
    rows = metrics(run)
    assert rows[-1]["train/loss"] < 0.6 < rows[0]["train/loss"]
    assert rows[-1]["train/rewards/accuracies"] > 0.5


def test_results_are_the_last_validation(run: Run) -> None:
    last = [row for row in metrics(run) if "val/loss" in row][-1]
    assert result_values(run) == pytest.approx({f"val/{n}": last[f"val/{n}"] for n in PAIR_METRICS})


SAMPLE_KEYS = {"step", "id", "prompt", "policy", "reference", "policy_ended", "reference_ended"}


def test_samples_show_both_models_at_every_validation(run: Run) -> None:
    rows = [json.loads(line) for line in run.samples_path.read_text().splitlines()]
    assert {row["step"] for row in rows} == {2, 4, 6}
    assert all(row.keys() == SAMPLE_KEYS for row in rows)
    assert all(row["prompt"].rstrip().endswith("Assistant:") for row in rows)
    assert len({row["reference"] for row in rows}) == len({row["id"] for row in rows}), "the reference does not change"


def test_the_reference_is_bit_identical_after_training(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    import dpo.cli.main

    captured = {}
    after_fit = dpo.cli.main.TrainingCLI.after_fit
    monkeypatch.setattr(
        dpo.cli.main.TrainingCLI, "after_fit", lambda cli: (captured.update(cli=cli), after_fit(cli))[1]
    )
    lab.fit("frozen", "--trainer.max_steps=3", "--optimizer.lr=1e-2", "--data.val_fraction=0")
    module = captured["cli"].model
    before = AutoModelForCausalLM.from_pretrained(policy()).state_dict()
    reference, trained = module.reference.model.state_dict(), module.policy.state_dict()
    assert all(torch.equal(reference[name], before[name]) for name in before)
    assert not any(torch.equal(trained[name], before[name]) for name in before)
    assert not any(part.training for part in module.policy.modules()), "dropout is always off"


ONE_STEP = [
    *("--data.batch_size=8", "--data.shuffle=false", "--data.val_fraction=0", "--trainer.max_steps=1"),
    *("--trainer.gradient_clip_val=0", "--optimizer=SGD", "--optimizer.lr=1.0"),
]


@pytest.fixture(scope="module")
def whole(lab: Lab) -> Run:
    """One step of plain gradient descent on a single batch of eight pairs."""
    return lab.fit("whole", *ONE_STEP, "--data.max_tokens=null")


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("micro", "--data.max_tokens=150"),  # micro-batches of two or three pairs
        ("single", "--data.max_tokens=1"),  # micro-batches of one pair
        ("2x4", "--trainer.accumulate_grad_batches=2"),
        ("4x2", "--trainer.accumulate_grad_batches=4"),
        ("8x1", "--trainer.accumulate_grad_batches=8"),
        ("recomputed", "--model.gradient_checkpointing=true"),
        ("separate", "--model.sharing=false"),
    ],
)
def test_splitting_a_step_does_not_change_it(lab: Lab, whole: Run, name: str, option: str) -> None:
    start = AutoModelForCausalLM.from_pretrained(policy()).state_dict()
    split = lab.fit(name, *ONE_STEP, option)
    expected, actual = weights(whole), weights(split)
    for key, value in start.items():
        step = expected[f"policy.{key}"] - value  # the gradient, as the learning rate is 1
        assert step.abs().max() > 1e-4
        torch.testing.assert_close(actual[f"policy.{key}"] - value, step, rtol=1e-4, atol=1e-6)
    for column in ("train/loss", "train/logps/chosen", "train/grad_norm", "train/entropy"):
        assert metrics(split)[0][column] == pytest.approx(metrics(whole)[0][column], rel=1e-5)


def test_without_validation_the_table_has_the_training_steps(lab: Lab, whole: Run) -> None:
    assert not list(whole.checkpoint_folder.glob("best*"))
    header, row = (whole.folder / "results.csv").read_text().splitlines()
    assert header.startswith("step,training loss,validation loss,rewards/chosen")
    assert row.startswith("1,0.6931") and row.split(",")[2] == ""


def test_a_run_is_not_overwritten(lab: Lab, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    assert lab.main("fit", "--name=one", "--trainer.max_steps=1") == 1
    message = capsys.readouterr().err
    assert f"the run {run.folder} exists" in message and "--ckpt_path" in message
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


# The process that trains may be between writing a checkpoint and its hash.
@pytest.mark.filterwarnings("ignore:.* has no SHA-256 beside it")
def test_one_process_at_a_time_trains_a_run(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """After a SIGKILL, another process can resume the run."""
    run = Run(lab.folder / "shared")
    options = ["--name=shared", "--data.val_fraction=0", "--trainer.val_check_interval=1"]
    process = lab.start("fit", *options, "--trainer.max_epochs=1000")
    try:
        deadline = time.monotonic() + 120
        while not (run.checkpoint_folder / "last.ckpt.sha256").exists() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        for more in ([], ["--ckpt_path=last"]):
            assert lab.main("fit", *options, "--trainer.max_steps=1", *more) == 1
            assert f"another process trains in {run.folder}" in capsys.readouterr().err
    finally:
        process.kill()
        process.communicate()
    step = checkpoint(run)["global_step"]
    partial = run.checkpoint_folder / ".last.ckpt.1.tmp"
    partial.write_bytes(b"half")
    assert lab.main("fit", *options, "--ckpt_path=last", f"--trainer.max_steps={step + 1}") == 0
    assert metrics(run)[-1]["step"] == step + 1
    assert not partial.exists()


def test_two_processes_can_write_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    with write_atomically(file) as first:
        first.write_text("first")
        monkeypatch.setattr("os.getpid", lambda: 0)  # as if in another process
        with write_atomically(file) as second:
            second.write_text("second")
        assert file.read_text() == "second"
    assert file.read_text() == "first"


def test_the_default_name_has_date_and_seed(lab: Lab) -> None:
    assert lab.main("fit", "--trainer.max_steps=1", "--data.val_fraction=0", "--seed_everything=7") == 0
    assert (lab.folder / "latest").resolve().name.endswith("-seed7")


def test_a_file_is_complete_or_absent(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with write_atomically(file) as temporary:
        temporary.write_text("first")
    with pytest.raises(KeyError), write_atomically(file) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert file.read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_complete_or_absent(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for text in ("first", "second"):
        with write_atomically(folder) as temporary:
            temporary.mkdir()
            (temporary / "file").write_text(text)
    with pytest.raises(KeyError), write_atomically(folder) as temporary:
        temporary.mkdir()
        raise KeyError
    assert (folder / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_rows_are_dropped_from_a_step_on_whatever_text_they_hold(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"step": step, "text": "one\u2028two\x85three\nfour\rfive"} for step in (1, 2, 2, 3)]
    append_jsonl(file, rows)
    drop_rows_from_step(file, 2)
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]] == rows[:1]


def test_a_terminal_that_lacks_a_character_does_not_end_the_run(lab: Lab) -> None:
    options = ["--name=ascii", "--trainer.max_steps=1", "--data.val_fraction=0", "--trainer.enable_progress_bar=true"]
    process = lab.start("fit", *options, PYTHONIOENCODING="ascii")
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed

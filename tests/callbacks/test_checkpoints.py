"""Checkpoints: what they hold, which are refused, and that a resumed run equals an uninterrupted one."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from dpo.callbacks.checkpoints import LastAndBest
from dpo.files import append_jsonl
from dpo.models.checkpoint_io import AtomicCheckpointIO
from dpo.runs.folder import Run
from tests.support.runs import Lab, checkpoint, metrics, policy, weights

RATE = "--optimizer.lr=1e-3"
EPOCHS = ["--trainer.max_epochs=2", "--trainer.val_check_interval=2", RATE]  # five steps each
unhashed = pytest.mark.filterwarnings("ignore:.*has no SHA-256 beside it:UserWarning")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(lab: Lab) -> Run:
    """A run of two epochs without interruption."""
    return lab.fit("whole", *EPOCHS)


def test_a_checkpoint_does_not_hold_a_fixed_reference(lab: Lab, whole: Run) -> None:
    saved = checkpoint(whole)
    assert {name.split(".")[0] for name in saved["state_dict"]} == {"policy"}
    policy_bytes = (policy() / "model.safetensors").stat().st_size
    # the policy and AdamW's two moments; with the reference it would be four times the policy
    assert 3 * policy_bytes < (whole.checkpoint_folder / "last.ckpt").stat().st_size < 3.6 * policy_bytes


def test_best_has_the_lowest_validation_loss(whole: Run) -> None:
    losses = {row["step"]: row["val/loss"] for row in metrics(whole) if "val/loss" in row}
    assert checkpoint(whole, "best")["global_step"] == min(losses, key=losses.__getitem__)
    assert checkpoint(whole, "last")["global_step"] == 10


@pytest.mark.parametrize("stop", [1, 2, 5, 7])  # within an epoch, at a validation, at the end of an epoch, after it
def test_a_resumed_run_equals_an_uninterrupted_one(lab: Lab, whole: Run, stop: int) -> None:
    assert_resumed_run_equals(lab, whole, stop, *EPOCHS)


@pytest.fixture(scope="module")
def unvalidated(lab: Lab) -> Run:
    return lab.fit("unvalidated", *EPOCHS, "--data.val_fraction=0")


@pytest.mark.parametrize("stop", [3, 5])
def test_a_resumed_run_without_validation_equals_an_uninterrupted_one(lab: Lab, unvalidated: Run, stop: int) -> None:
    assert_resumed_run_equals(lab, unvalidated, stop, *EPOCHS, "--data.val_fraction=0")


@pytest.mark.parametrize(
    ("schedule", "changed_option", "expected"),
    [
        ([], "--optimizer.lr=2e-4", (2e-4, 2e-4)),
        (["Warmup", "warmup_steps=5"], "--optimizer.lr=2e-3", (2e-3 * 4 / 5, 2e-3)),
        (["Warmup", "warmup_steps=5"], "--lr_scheduler.warmup_steps=8", (1e-3 * 4 / 8, 1e-3 * 5 / 8)),
        # Half of the resumed run's 4 steps; half of the first run's 2 was over after one.
        (["Warmup", "warmup_ratio=0.5"], "--optimizer.lr=2e-3", (2e-3, 2e-3)),
        (["Warmup", "warmup_ratio=1"], "--optimizer.lr=2e-3", (2e-3 * 4 / 4, 2e-3)),
        (["CosineAnnealingLR", "T_max=4"], "--optimizer.lr=2e-3", (2e-3 * (1 + math.cos(math.pi * 3 / 4)) / 2, 0.0)),
    ],
)
def test_optimizer_options_override_those_of_the_checkpoint(
    schedule: list[str],
    changed_option: str,
    expected: tuple[float, float],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two steps, then two with other options; the rate logged after step n is that of the next step."""
    lab = Lab(tmp_path)
    options = [RATE, "--optimizer.weight_decay=0.01", "--data.val_fraction=0"]
    if schedule:
        options += [f"--lr_scheduler={schedule[0]}", f"--lr_scheduler.{schedule[1]}"]
    run = lab.fit("changed", *options, "--trainer.max_steps=2")
    assert "Optimizer: " not in caplog.text
    lab.fit(
        "changed", *options, "--trainer.max_steps=4", "--ckpt_path=last", changed_option, "--optimizer.weight_decay=0.5"
    )
    assert [row["train/learning_rate"] for row in metrics(run)][2:] == pytest.approx(expected)
    assert "Optimizer: weight_decay is 0.5, in the checkpoint 0.01." in caplog.messages
    assert checkpoint(run)["optimizer_states"][0]["param_groups"][0]["weight_decay"] == 0.5


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = Lab(tmp_path)
    run = lab.fit("adam", RATE, "--data.val_fraction=0", "--trainer.max_steps=1")
    options = ["--optimizer=torch.optim.RMSprop", "--name=adam", "--data.val_fraction=0", "--ckpt_path=last"]
    saved = (run.checkpoint_folder / "last.ckpt").read_bytes()
    config = run.config_path.read_bytes()
    assert lab.main("fit", *options) == 1
    assert run.config_path.read_bytes() == config
    assert "holds the state of AdamW: expected --optimizer AdamW, got RMSprop" in capsys.readouterr().err
    assert (run.checkpoint_folder / "last.ckpt").read_bytes() == saved


def assert_resumed_run_equals(lab: Lab, expected: Run, stop: int, *options: str) -> None:
    """Stop and resume: all is equal to the bit, except for timings and an additional validation at the stop."""
    name = f"{expected.folder.name}-{stop}"
    run = lab.fit(name, *options, f"--trainer.max_steps={stop}")
    assert checkpoint(run)["global_step"] == stop
    lab.fit(name, *options, "--ckpt_path=last")
    assert without_timings(run, "train/") == without_timings(expected, "train/")
    validated = without_timings(run, "val/")
    validated[stop - 1] = without_timings(expected, "val/")[stop - 1]
    assert validated == without_timings(expected, "val/")
    resumed_weights, expected_weights = weights(run), weights(expected)
    assert all(torch.equal(resumed_weights[name], value) for name, value in expected_weights.items())


def without_timings(run: Run, stage: str) -> list[dict[str, float]]:
    clocks = ("train/tokens_per_second", "train/time/step", "train/time/data")
    return [
        {name: value for name, value in row.items() if name.startswith(stage) and name not in clocks}
        for row in metrics(run)
    ]


def resume_options(way: str, run: Run) -> list[str]:
    """Three ways to resume a run without giving its name."""
    options = {"path": [f"--ckpt_path={run.checkpoint_folder / 'last.ckpt'}"], "newest": ["--ckpt_path=last"]}
    return options.get(way, [f"--config={run.config_path}", "--ckpt_path=last"])


@pytest.mark.parametrize("way", ["path", "newest", "configuration"])
def test_a_checkpoint_or_a_configuration_names_the_run_to_resume(lab: Lab, way: str) -> None:
    run = lab.fit(way, "--trainer.max_steps=1", "--data.val_fraction=0")
    assert lab.main("fit", *resume_options(way, run), "--trainer.max_steps=2", "--data.val_fraction=0") == 0
    assert [row["step"] for row in metrics(run)] == [1, 2]


def test_a_configuration_alone_is_enough_to_resume(lab: Lab) -> None:
    run = lab.fit("alone", "--trainer.max_steps=1", "--data.val_fraction=0")
    assert lab.only("fit", f"--config={run.config_path}", "--ckpt_path=last", "--trainer.max_steps=2") == 0
    assert [row["step"] for row in metrics(run)] == [1, 2]
    again = ["--name=afresh", "--trainer.max_steps=1"]  # a run of another name does not resume
    assert lab.only("fit", f"--config={run.config_path}", *again) == 0
    assert [row["step"] for row in metrics(Run(lab.folder / "afresh"))] == [1]


def test_a_run_of_another_name_continues_a_checkpoint_and_leaves_its_run_alone(lab: Lab, whole: Run) -> None:
    before = whole.metrics_path.read_text()
    branch = lab.fit(
        "branch", *EPOCHS, f"--ckpt_path={whole.checkpoint_folder / 'last.ckpt'}", "--trainer.max_epochs=3"
    )
    assert [row["step"] for row in metrics(branch)] == [11, 12, 13, 14, 15]
    assert whole.metrics_path.read_text() == before


def test_samples_of_repeated_steps_are_stored_once(lab: Lab) -> None:
    """As in metrics.csv, rows behind the checkpoint are dropped when training resumes."""
    run = lab.fit("again", *EPOCHS, "--trainer.max_steps=4")
    assert sampled_steps(run) == [2, 2, 4, 4]  # two prompts, at every validation
    rows = [json.loads(line) for line in run.samples_path.read_text(encoding="utf-8").splitlines()]
    append_jsonl(run.samples_path, [{**row, "step": row["step"] + 5} for row in rows])
    assert sampled_steps(run) == [2, 2, 4, 4, 7, 7, 9, 9]
    lab.fit("again", *EPOCHS, "--ckpt_path=last", "--trainer.max_steps=7")
    assert sampled_steps(run) == [2, 2, 4, 4, 7, 7]


def test_samples_of_a_repeated_validation_are_stored_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was killed between its samples and its checkpoint repeats the validation."""
    with monkeypatch.context() as patch:
        patch.setattr(LastAndBest, "on_validation_end", lambda *_: None)
        run = lab.fit("repeated", *EPOCHS, "--trainer.max_steps=2")
    again = ["--trainer.max_steps=4", "--ckpt_path=last"]
    lab.fit("repeated", *EPOCHS, *again)
    assert sampled_steps(run) == [2, 2, 4, 4]


def sampled_steps(run: Run) -> list[int]:
    return [json.loads(line)["step"] for line in run.samples_path.read_text(encoding="utf-8").splitlines()]


def test_best_resumes_from_the_best_checkpoint(lab: Lab) -> None:
    run = lab.fit("best", "--trainer.max_steps=4", "--trainer.val_check_interval=2", RATE)
    best = checkpoint(run, "best")["global_step"]
    assert lab.main("fit", "--name=best", "--ckpt_path=best", f"--trainer.max_steps={best + 1}", RATE) == 0
    assert [row["step"] for row in metrics(run)] == list(range(1, best + 2))


def refusal_message(lab: Lab, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Return the message of a refused command line, which must leave no run behind."""
    before = sorted(lab.folder.iterdir())
    capsys.readouterr()
    assert lab.main("fit", *EPOCHS, *options) == 1
    assert sorted(lab.folder.iterdir()) == before
    return capsys.readouterr().err


@pytest.mark.parametrize("path", ["http://localhost/x.ckpt", "s3://bucket/x.ckpt", "file:///x.ckpt", "nowhere.ckpt"])
def test_only_local_files_are_read(lab: Lab, capsys: pytest.CaptureFixture[str], path: str) -> None:
    message = refusal_message(lab, capsys, "--name=remote", f"--ckpt_path={path}")
    assert f"--ckpt_path: expected last, best or a checkpoint file on this machine, got {path}." in message


def test_last_of_a_run_without_checkpoints_is_refused(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert "got " + str(lab.folder / "none") in refusal_message(lab, capsys, "--name=none", "--ckpt_path=last")


def copy_checkpoint(whole: Run, tmp_path: Path) -> Path:
    for file in whole.checkpoint_folder.glob("last*"):
        shutil.copy(file, tmp_path)
    return tmp_path / "last.ckpt"


@pytest.mark.parametrize("harm", ["flipped", "truncated"])
def test_a_changed_checkpoint_is_refused(
    lab: Lab, whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    path = copy_checkpoint(whole, tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if harm == "flipped" else content[:-100])
    assert lab.main("fit", *EPOCHS, f"--name={harm}", f"--ckpt_path={path}") == 1
    assert f"{path} was changed or truncated after it was written" in capsys.readouterr().err


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return (Path.touch, (Path("executed"),))


@unhashed
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "x": Payload()}, "bad.ckpt")
    with pytest.raises(ValueError, match=r"bad\.ckpt is not a checkpoint of tensors and plain values"):
        AtomicCheckpointIO().load_checkpoint("bad.ckpt")
    assert not Path("executed").exists()


@unhashed
@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_a_file_that_is_not_a_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.ckpt is not a checkpoint"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")


@unhashed
def test_options_are_not_read_from_a_checkpoint(lab: Lab, whole: Run, tmp_path: Path) -> None:
    saved = checkpoint(whole)
    saved["hyper_parameters"] = {"loss": {"class_path": "tests.nowhere.Loss"}, "_instantiator": "os.system"}
    torch.save(saved, tmp_path / "foreign.ckpt")
    lab.fit("foreign", *EPOCHS, f"--ckpt_path={tmp_path / 'foreign.ckpt'}", "--trainer.max_epochs=3")


def test_another_reference_is_refused(lab: Lab, whole: Run, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--name=other",
        f"--ckpt_path={whole.checkpoint_folder / 'last.ckpt'}",
        f"--model.reference={policy(seed=1)}",
    ]
    assert lab.main("fit", *EPOCHS, *options) == 1
    message = capsys.readouterr().err
    assert f"trained against a reference with SHA-256 {checkpoint(whole)['reference_sha256'][:16]}" in message
    assert "--model.reference" in message


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--data.batch_size=2", "--data.batch_size 4 (now 2)"),
        ("--seed_everything=5", "--seed_everything 0 (now 5)"),
        ("--data.seed=5", "--data.seed 0 (now 5)"),
        ("--data.shuffle=false", "--data.shuffle True (now False)"),
        ("--data.val_fraction=0.5", "--data: training pairs with SHA-256 "),
        ("--data.max_length=64", "--data: training pairs with SHA-256 "),
        ("--trainer.accumulate_grad_batches=2", "--trainer.accumulate_grad_batches 1 (now 2)"),
        ("--model.loss.beta=0.2", "--model.loss DPO(beta=0.1"),
        ("--model=SFT", "--model DPO (now SFT)"),
    ],
)
def test_changed_training_options_are_refused_and_no_file_changes(
    lab: Lab, whole: Run, capsys: pytest.CaptureFixture[str], word: str, expected: str
) -> None:
    files = [whole.config_path, whole.metrics_path, whole.audit_path, whole.checkpoint_folder / "last.ckpt"]
    before = [file.read_bytes() for file in files]
    assert lab.main("fit", "--name=whole", *EPOCHS, "--ckpt_path=last", "--trainer.max_epochs=3", word) == 1
    message = capsys.readouterr().err
    assert expected in message and "--model.policy" in message
    assert [file.read_bytes() for file in files] == before


@unhashed
def test_a_checkpoint_of_another_model_is_refused(
    lab: Lab, whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = checkpoint(whole)
    saved["state_dict"]["policy.model.more"] = saved["state_dict"].pop("policy.model.norm.weight")
    torch.save(saved, tmp_path / "other.ckpt")
    assert lab.main("fit", *EPOCHS, "--name=model", f"--ckpt_path={tmp_path / 'other.ckpt'}") == 1
    message = capsys.readouterr().err
    assert "weights missing ['policy.model.norm.weight'], unexpected ['policy.model.more']" in message


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, io = tmp_path / "x.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, path)

    def save_to_full_disk(state: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", save_to_full_disk)
    with pytest.raises(OSError, match="no space"):
        io.save_checkpoint({"step": 2}, path)
    assert io.load_checkpoint(path) == {"step": 1}
    assert {file.name for file in tmp_path.iterdir()} == {"x.ckpt", "x.ckpt.sha256"}


def test_the_message_for_a_full_disk_names_the_intact_checkpoints(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--name=full", "--data.val_fraction=0"]
    run = lab.fit("full", *options, "--trainer.max_steps=1")
    save = torch.save
    full_device = Path("/dev/full")  # every write to it fails
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda state, file: save(state, full_device))
        assert lab.main("fit", *options, "--trainer.max_steps=2", "--ckpt_path=last") == 1
    last = run.checkpoint_folder / "last.ckpt"
    *_, first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: the checkpoint {last} could not be written. Is the disk full? ")
    assert " MiB free." in first
    older = last.with_name("last-1.ckpt")  # the same, by another name
    assert second == f"Intact checkpoints: {older}, {last}. Free some space and resume from one with --ckpt_path."
    assert checkpoint(run)["global_step"] == 1
    lab.fit("full", *options, "--trainer.max_steps=2", "--ckpt_path=last")


@unhashed
def test_a_kill_between_checkpoint_and_hash_leaves_a_readable_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, io = tmp_path / "x.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)  # writes the hash
    with pytest.raises(KeyboardInterrupt):
        io.save_checkpoint({"step": 2}, path)
    assert io.load_checkpoint(path) == {"step": 2}


def test_a_checkpoint_is_removed_with_its_hash(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, tmp_path / "x.ckpt")
    io.remove_checkpoint(tmp_path / "x.ckpt")
    assert not list(tmp_path.iterdir())


def test_results_hold_the_last_validation_loss(lab: Lab, whole: Run) -> None:
    results = json.loads(whole.results_path.read_text())
    assert math.isfinite(results["val/loss"])
    assert results["val/loss"] == pytest.approx([row for row in metrics(whole) if "val/loss" in row][-1]["val/loss"])

"""The ledger: its values by plain forward passes, whole after any chain of stops, and what is refused."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from transformers import AutoModelForCausalLM

from dpo.callbacks import pair_buffer
from dpo.data.preferences import HHRLHF
from dpo.models.batch import Example
from dpo.runs.folder import Run
from dpo.runs.ledger import LEDGER_SCHEMA, read_ledger
from dpo.training.base import Stage
from dpo.training.dpo import DPO
from tests.support.runs import Lab, metrics, pairs, policy

RATE = "--optimizer.lr=1e-3"
END = "--trainer.max_steps=9"
EPOCHS = [RATE, "--trainer.max_epochs=2", "--trainer.val_check_interval=3"]  # five steps each, of four pairs


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(lab: Lab) -> Run:
    """Nine steps in two epochs, validated after three steps of each and at the end."""
    return lab.fit("whole", *EPOCHS, "--ledger.train_pairs=3", END)


def ledger(run: Run) -> pa.Table:
    return read_ledger(run).sort_by([(name, "ascending") for name in ("step", "split", "id", "trained")])


def rows(run: Run, **wanted: object) -> list[dict[str, Any]]:
    """The rows of a ledger that have these values."""
    return [row for row in ledger(run).to_pylist() if all(row[name] == value for name, value in wanted.items())]


def examples(split: str) -> dict[str, Example]:
    data = HHRLHF(str(pairs()), tokenizer=str(policy()), max_length=128)
    data.prepare_data()
    data.setup("fit")
    split_pairs = data.pairs_by_split[split]
    return {pair.id: pair for pair in map(split_pairs.__getitem__, range(len(split_pairs)))}


def plain_logp(model: torch.nn.Module, pair: Example, side: int) -> float:
    """log p(answer | prompt) in nats, by a forward pass of transformers over this one sequence."""
    answer = list(pair.answers[side])
    ids = torch.tensor([[*pair.prompt, *answer]])
    with torch.no_grad():
        logps = model(ids).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
    return float(logps.gather(1, torch.tensor(answer)[:, None]).sum())


def test_a_validation_holds_what_plain_forward_passes_give(whole: Run) -> None:
    """Policy: the export, which has the weights of the last step; reference: the model that training began from."""
    trained, untrained = (AutoModelForCausalLM.from_pretrained(each) for each in (whole.export_folder, policy()))
    validated = rows(whole, step=9, split="val")
    by_id = examples("val")
    assert [row["id"] for row in validated] == sorted(by_id) and len(by_id) == 4
    for row in validated:
        pair = by_id[row["id"]]
        ours, theirs = ([plain_logp(model, pair, side) for side in (0, 1)] for model in (trained, untrained))
        rewards = [0.1 * (a - b) for a, b in zip(ours, theirs, strict=True)]
        loss = -torch.nn.functional.logsigmoid(torch.tensor(rewards[0] - rewards[1])).item()
        given = [row[name] for name in LEDGER_SCHEMA.names[8:15]]
        assert given == pytest.approx([*ours, *theirs, *rewards, loss], abs=2e-4)
        lengths = [row["prompt_tokens"], row["chosen_tokens"], row["rejected_tokens"]]
        assert lengths == [len(pair.prompt), *map(len, pair.answers)]
        assert (row["subset"], row["trained"]) == ("pairs", False)


def test_turns_are_those_of_the_prompt(whole: Run) -> None:
    """Every second dialogue of the data has an exchange before its last question."""
    for row in ledger(whole).to_pylist():
        line = int(row["id"].rpartition(":")[2])
        assert row["turns"] == 1 + (line - 1) % 2


def test_training_rows_are_those_of_the_step(whole: Run) -> None:
    logged = {row["step"]: row for row in metrics(whole)}
    untrained = AutoModelForCausalLM.from_pretrained(policy())
    by_id = examples("train")
    for row in rows(whole, step=1, trained=True):  # before the first update
        given = [row["chosen_logp"], row["rejected_logp"], row["chosen_reward"], row["loss"]]
        expected = [plain_logp(untrained, by_id[row["id"]], side) for side in (0, 1)]
        assert given == pytest.approx([*expected, 0, 0.6931472], abs=1e-4)
    seen: dict[int, list[str]] = {0: [], 1: []}
    for step in range(1, 10):
        step_rows = rows(whole, step=step, trained=True)
        assert sum(row["loss"] for row in step_rows) / 4 == pytest.approx(logged[step]["train/loss"], abs=1e-6)
        seen[(step - 1) // 5] += [row["id"] for row in step_rows]
    assert sorted(seen[0]) == sorted(by_id)  # every pair once an epoch
    assert len(seen[1]) == len(set(seen[1])) == 16


def test_the_same_training_pairs_are_measured_anew_at_every_validation(whole: Run) -> None:
    validated = sorted({row["step"] for row in rows(whole, split="val")})
    assert validated == [3, 8, 9]
    by_step = [rows(whole, step=step, split="train", trained=False) for step in validated]
    ids = [[row["id"] for row in found] for found in by_step]
    assert all(each == ids[0] for each in ids) and len(set(ids[0])) == 3
    trained = AutoModelForCausalLM.from_pretrained(whole.export_folder)
    for row in by_step[-1]:
        pair = examples("train")[row["id"]]
        given = [row["chosen_logp"], row["rejected_logp"]]
        assert given == pytest.approx([plain_logp(trained, pair, side) for side in (0, 1)], abs=2e-4)


def test_measuring_training_pairs_changes_no_metric(lab: Lab, whole: Run) -> None:
    without = lab.fit("without", *EPOCHS, END, "--ledger.enabled=false")
    assert not without.ledger_path.exists()
    names = ("step", "train/loss", "val/loss", "val/rewards/accuracies", "train/grad_norm")
    found, expected = ([[row.get(name) for name in names] for row in metrics(run)] for run in (without, whole))
    assert found == expected


def test_it_is_one_data_set_of_parquet_files(whole: Run) -> None:
    table = parquet.read_table(whole.ledger_path)
    assert table.schema.equals(LEDGER_SCHEMA) and len(table) == len(read_ledger(whole))
    assert all(file.name.startswith("step-") and file.suffix == ".parquet" for file in whole.ledger_path.iterdir())


class Killed(BaseException):
    """As if the process were gone: no handler of ours saves anything."""


def fit_until(lab: Lab, method: str, is_there: Callable[[Stage], bool], *words: str) -> None:
    """Train until a method of the stage is called at some point, and end there."""
    original = getattr(Stage, method)

    def call(stage: Stage, *arguments: Any) -> Any:
        if is_there(stage):
            raise Killed
        return original(stage, *arguments)

    with patch.object(Stage, method, call), pytest.raises(Killed):
        lab.main("fit", *words)


@pytest.mark.parametrize(("accumulate", "every"), [(1, 2), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_a_chain_of_stops_gives_the_ledger_of_a_run_that_never_stopped(lab: Lab, accumulate: int, every: int) -> None:
    intervals = [f"--trainer.val_check_interval={3 * accumulate}", f"--checkpoint.every_n_steps={every}"]
    words = [*EPOCHS, f"--trainer.accumulate_grad_batches={accumulate}", *intervals, "--ledger.train_pairs=2"]
    expected = lab.fit(f"never-{accumulate}", *words)
    run = Run(lab.folder / f"chain-{accumulate}")
    words += [f"--name={run.folder.name}", "--ckpt_path=auto"]
    for step in (3, 5, 7):  # in the last batch of this step
        place = step * accumulate - 1
        fit_until(lab, "training_step", lambda stage: stage.trainer.fit_loop.total_batch_idx == place, *words)  # noqa: B023
    assert lab.main("fit", *words) == 0
    assert ledger(run).equals(ledger(expected))


def test_a_validation_that_was_killed_leaves_no_rows_and_is_made_up(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in metrics.csv, a validation is there as a whole or not at all."""
    monkeypatch.setattr(pair_buffer, "MOST_BUFFERED", 2)
    words = ["--name=cut", *EPOCHS, "--data.max_tokens=64", "--data.batch_size=2", "--trainer.max_steps=4"]
    batches: list[int] = []

    def is_second(stage: Stage) -> bool:
        batches.append(stage.global_step)
        return len(batches) == 2

    fit_until(lab, "validation_step", is_second, *words)
    run = Run(lab.folder / "cut")
    assert any("measured" in file.name for file in run.ledger_path.iterdir())
    assert not rows(run, split="val") and len(rows(run, split="train")) == 3 * 2
    assert lab.main("fit", *words, "--ckpt_path=last") == 0
    assert {row["step"] for row in rows(run, split="val")} == {3, 4}
    assert all(file.name.startswith("step-") for file in run.ledger_path.iterdir())


def test_going_back_to_an_older_checkpoint_removes_later_rows(lab: Lab) -> None:
    words = [RATE, "--data.val_fraction=0", "--checkpoint.every_n_steps=2", "--checkpoint.keep=9"]
    run = lab.fit("back", *words, "--trainer.max_steps=5")
    leftover = run.ledger_path / ".step-00000002-rank0-trained.parquet.1.tmp"
    leftover.write_bytes(b"half")
    saved = {torch.load(file, weights_only=True)["global_step"]: file for file in run.checkpoint_folder.glob("*.ckpt")}
    lab.fit("back", *words, "--trainer.max_steps=3", f"--ckpt_path={saved[2]}")
    assert [row["step"] for row in rows(run)] == [1] * 4 + [2] * 4 + [3] * 4
    assert not leftover.exists()


def test_rows_leave_memory_in_blocks(lab: Lab, whole: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    add = pair_buffer.PairBuffer.add_pairs

    def counted(buffer: pair_buffer.PairBuffer, *arguments: Any) -> None:
        add(buffer, *arguments)
        held.append(buffer.pair_count)

    monkeypatch.setattr(pair_buffer, "MOST_BUFFERED", 8)
    monkeypatch.setattr(pair_buffer.PairBuffer, "add_pairs", counted)
    run = lab.fit("blocks", *EPOCHS, END, "--ledger.train_pairs=3", "--data.max_tokens=64")
    assert max(held) <= 8 + 3  # it is emptied after the step that fills it
    same = ["step", "split", "id", "trained", "chosen_tokens"]
    assert ledger(run).select(same).equals(ledger(whole).select(same))


def test_a_sample_of_the_validation_pairs(lab: Lab) -> None:
    run = lab.fit("sample", *EPOCHS, "--ledger.pairs=3")
    by_step = {step: [row["id"] for row in rows(run, step=step, split="val")] for step in (3, 8)}
    assert by_step[3] == by_step[8] and len(set(by_step[3])) == 3


def test_without_a_reference_its_columns_are_null(lab: Lab) -> None:
    run = lab.fit("free", "--model.loss=SimPO", "--trainer.max_steps=1")
    table = read_ledger(run)
    assert table["reference_chosen_logp"].null_count == table["reference_rejected_logp"].null_count == len(table) == 8
    assert table["chosen_reward"].null_count == 0


def test_other_verbs_write_no_ledger(lab: Lab, whole: Run) -> None:
    before = ledger(whole)
    for verb in ("validate", "test"):
        assert lab.main(verb, "--name=whole", "--ckpt_path=last") == 0
    assert ledger(whole).equals(before)


def test_the_supervised_stage_has_no_ledger(lab: Lab) -> None:
    run = lab.fit("sft", "--model=SFT", "--trainer.max_steps=2")
    with pytest.raises(FileNotFoundError, match=r"--ledger\.enabled true"):
        read_ledger(run)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fit", "--ledger.pairs=0"], "--ledger.pairs: expected at least 1 pair, or null for all, got 0"),
        (["fit", "--ledger.train_pairs=-1"], "--ledger.train_pairs: expected at least 0 pairs, got -1"),
        (["fit", "--ledger.enabled=false", "--ledger.pairs=2"], "expected neither --ledger.pairs nor"),
        (["fit", "--model=SFT", "--ledger.pairs=2"], "--ledger: expected none, as SFT compares no pairs"),
        (["fit", "--model=SFT", "--ledger.enabled=true"], "--ledger: expected none, as SFT compares no pairs"),
        (["fit", "--data.val_fraction=0", "--ledger.train_pairs=2"], "--ledger.train_pairs: expected validations"),
        (["test", "--ledger.pairs=2"], "--ledger: expected none, as only fit writes a ledger, not test"),
    ],
)
def test_what_it_cannot_do_is_refused(
    lab: Lab, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    verb, *options = words
    assert lab.main(verb, "--name=refused", *options) == 1
    assert expected in capsys.readouterr().err
    assert not (lab.folder / "refused").exists()


def test_listeners_are_gone_after_training(lab: Lab) -> None:
    """A stage that is trained by two trainers must not fill the buffers of the first one's callbacks."""
    stages: list[Stage] = []
    training_step = DPO.training_step

    def step(stage: DPO, *arguments: Any) -> torch.Tensor:
        stages.append(stage)
        return training_step(stage, *arguments)

    with patch.object(DPO, "training_step", step):
        lab.fit("listeners", "--trainer.max_steps=1")
    assert stages[0].pair_listeners == []

"""What a notebook gets wrong is said before anything is trained, in the words of Python."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import default_collate

from dpo import DPO, HHRLHF, SFT, Cached, Example, LoRA, losses
from tests.support.runs import pairs, policy

FAST = partial(torch.optim.AdamW, lr=1e-3)
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:The dirpath has changed")


def trainer(folder: Path, **options: object) -> L.Trainer:
    fixed = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(**fixed, default_root_dir=folder, **{"max_steps": 2, **options})


def rows(**options: object) -> HHRLHF:
    return HHRLHF(str(pairs()), **{"batch_size": 4, "max_length": 128, **options})


def examples(count: int) -> list[Example]:
    return [Example(f"mine:{i}", [5, 6, 7 + i], ([8, 9], [10, 11 + i, 12])) for i in range(count)]


WRONG_ARGUMENTS = {
    "DPO(adapter='lora')": "adapter: expected an object such as LoRA(r=16), got 'lora'",
    "DPO(adapter=LoRA)": "adapter: expected an object such as LoRA(r=16), got <class",
    "DPO(optimizer='adamw')": "optimizer: expected what makes one from parameters",
    "DPO(optimizer=1e-4)": "optimizer: expected what makes one from parameters",
    "DPO(reference='Cached')": "reference: expected Cached() as an object",
    "DPO(reference=Cached)": "reference: expected an object such as Copy()",
    "DPO(loss='DPO')": "loss: expected an object such as",
    "LoRA(r=0)": "adapter.r: expected at least 1, got 0",
    "losses.DPO(beta='0.1')": "beta: expected a number in (0, inf), got '0.1'",
    "PreferencePairs([{'prompt': 'a'}])": "rows in memory: write a file",
    "HHRLHF(['harmless-base'])": "path: expected a folder or hub id",
    "DPO().generate([{'role': 'user', 'content': 'hi'}])": "got one message without a list",
}


def test_arguments_of_a_wrong_type_are_named_when_they_are_given() -> None:
    """In a process of its own, as types are checked on every call where tests run."""
    script = "from dpo import DPO, HHRLHF, Cached, LoRA, PreferencePairs, losses\n" + "".join(
        f"try:\n    {call}\nexcept (TypeError, ValueError) as error:\n    print(str(error).splitlines()[0])\n"
        for call in WRONG_ARGUMENTS
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for message, says in zip(done.stdout.splitlines(), WRONG_ARGUMENTS.values(), strict=True):
        assert says in message


def test_prompts_and_answers_that_cannot_be_used_are_named() -> None:
    model = DPO(str(policy()))
    with pytest.raises(ValueError, match=r"an answer that fits into 256 tokens, got one of 10,00. characters"):
        model.rewards("hi", ["word" * 2_500])
    assert model.generate([]) == [] and model.rewards("hi", []) == []


def test_a_loader_of_examples_needs_no_collate_function() -> None:
    assert default_collate(examples(2)) == examples(2)


@pytest.mark.parametrize("stage", [DPO, SFT])
def test_accumulated_batches_of_unequal_size_are_refused(stage: type, tmp_path: Path) -> None:
    """Their optimizer step would be the mean of means, not the mean over its examples (for SFT: tokens)."""
    if stage is DPO:
        loader = DataLoader(examples(7), batch_size=4)
    else:
        loader = DataLoader([Example(f"mine:{i}", [5, 6], ([8] * (i + 1),)) for i in range(8)], batch_size=4)
    with pytest.raises(ValueError, match="expected batches of one size"):
        trainer(tmp_path, accumulate_grad_batches=2).fit(stage(str(policy())), loader)


def test_accumulated_batches_of_one_size_are_one_step(tmp_path: Path) -> None:
    weights = []
    for batch_size, accumulate in ((8, 1), (4, 2)):
        model = DPO(str(policy()), optimizer=partial(torch.optim.SGD, lr=0.1))
        loader = DataLoader(examples(8), batch_size=batch_size)
        trainer(tmp_path / str(accumulate), max_steps=1, accumulate_grad_batches=accumulate).fit(model, loader)
        weights.append(torch.nn.utils.parameters_to_vector(model.policy.parameters()))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)


def test_a_cached_reference_serves_every_stage_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    measured = []
    for reference in (None, Cached()):
        model, data = DPO(str(policy()), reference=reference, optimizer=FAST), rows()
        run = trainer(tmp_path / str(reference))
        run.fit(model, data)
        (val,) = run.validate(model, data, verbose=False)
        (test,) = run.test(model, data, verbose=False)
        (again,) = run.validate(model, data, verbose=False)
        predicted = [row["rewards"] for step in run.predict(model, data) for row in step]
        assert again == val
        measured.append((val | test, predicted))
    (plain, plain_rewards), (cached, cached_rewards) = measured
    assert cached == pytest.approx(plain, abs=1e-4)
    assert torch.tensor(cached_rewards) == pytest.approx(torch.tensor(plain_rewards), abs=1e-4)


def test_a_cached_reference_of_an_adapter_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    model, data = DPO(str(policy()), reference=Cached(), adapter=LoRA(r=2), optimizer=FAST), rows()
    run = trainer(tmp_path)
    run.fit(model, data)
    (measured,) = run.test(model, data, verbose=False)
    assert 0 < measured["test/loss"] < 1


def test_a_cached_reference_needs_rows_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reference Cached: expected a data module"):
        trainer(tmp_path).fit(DPO(str(policy()), reference=Cached()), DataLoader(examples(8), batch_size=4))


@pytest.mark.parametrize(
    ("module", "data", "options", "says"),
    [
        ({"loss": losses.IPO()}, {}, {}, "--model.loss DPO"),
        ({}, {"batch_size": 8}, {}, "--data.batch_size 4"),
        ({}, {"seed": 1}, {}, "--data.seed 0"),
        ({}, {}, {"accumulate_grad_batches": 2}, "--trainer.accumulate_grad_batches 1"),
        ({"optimizer": partial(torch.optim.SGD, lr=0.1)}, {}, {}, "expected --optimizer AdamW, got SGD"),
    ],
)
def test_resuming_with_other_options_is_refused(
    module: dict, data: dict, options: dict, says: str, tmp_path: Path
) -> None:
    run = trainer(tmp_path)
    run.fit(DPO(str(policy()), optimizer=FAST), rows())
    saved = run.checkpoint_callback.best_model_path
    with pytest.raises(ValueError, match=says):
        trainer(tmp_path / "resumed", max_steps=4, **options).fit(
            DPO(str(policy()), **{"optimizer": FAST, **module}), rows(**data), ckpt_path=saved
        )


def test_a_new_learning_rate_counts_when_resuming(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.fit(DPO(str(policy()), optimizer=FAST), rows())
    resumed = trainer(tmp_path / "resumed", max_steps=3)
    changed = DPO(str(policy()), optimizer=partial(torch.optim.AdamW, lr=5e-4))
    resumed.fit(changed, rows(), ckpt_path=run.checkpoint_callback.best_model_path)
    assert resumed.optimizers[0].param_groups[0]["lr"] == 5e-4

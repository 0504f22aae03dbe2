"""The package as a notebook uses it: no command line, no run folder, any Trainer."""

import copy
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo
from dpo import DPO, HHRLHF, SFT, Example, LoRA, losses
from dpo.losses import PairLogps, PreferenceLoss
from tests.support.runs import pairs, policy

OPTIONS = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture
def data() -> HHRLHF:
    return HHRLHF(str(pairs()), batch_size=4, max_length=128)


def trainer(folder: Path, **options: object) -> L.Trainer:
    return L.Trainer(**OPTIONS, default_root_dir=folder, **{"max_steps": 2, "logger": False, **options})


@pytest.fixture
def fast() -> partial[torch.optim.AdamW]:
    return partial(torch.optim.AdamW, lr=1e-3)


def test_a_notebook_from_data_to_a_saved_policy(data: HHRLHF, tmp_path: Path, fast: partial) -> None:
    model = DPO(str(policy()), loss=losses.DPO(beta=0.1), optimizer=fast)
    run = trainer(tmp_path, gradient_clip_val=1.0)
    run.fit(model, data)
    (measured,) = run.validate(model, data, verbose=False)
    assert measured["val/loss"] > 0 and "val/rewards/accuracies" in measured

    (ours,) = model.generate(["How do I boil an egg?"], max_new_tokens=8)
    (theirs,) = model.generate(["How do I boil an egg?"], reference=True, max_new_tokens=8)
    assert isinstance(ours, str) and isinstance(theirs, str)
    good, bad = model.rewards("How do I boil an egg?", ["In water.", "No."])
    assert good != 0 and bad != 0

    again = DPO.load_from_checkpoint(run.checkpoint_callback.best_model_path)
    assert again.policy_path == str(policy()) and again.loss == losses.DPO(beta=0.1)
    assert again.rewards("How do I boil an egg?", ["In water.", "No."]) == pytest.approx([good, bad], abs=1e-5)
    assert again.optimizer.keywords["lr"] == 1e-3

    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([tokenizer("Hello")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.policy(ids).logits)
    fresh = DPO(str(policy())).rewards("How?", ["Yes.", "No."])
    assert fresh == [0, 0]  # before training the policy is its reference


def test_the_policy_generates_by_transformers_while_prompts_are_shared(data: HHRLHF, tmp_path: Path) -> None:
    """During training (a user's callback) and afterwards, as any model of transformers does."""

    class Speak(L.Callback):
        spoken: torch.Tensor | None = None

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: DPO, *_: object) -> None:
            self.spoken = pl_module.policy.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)

    speak, model = Speak(), DPO(str(policy()), optimizer=partial(torch.optim.SGD, lr=1e-30))
    trainer(tmp_path, callbacks=[speak]).fit(model, data)
    plain = AutoModelForCausalLM.from_pretrained(policy())
    expected = plain.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert torch.equal(speak.spoken, expected)
    assert torch.equal(model.policy.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False), expected)


def test_the_data_take_tokenizer_and_sides_from_the_module(data: HHRLHF, tmp_path: Path, fast: partial) -> None:
    trainer(tmp_path / "sft").fit(SFT(str(policy()), optimizer=fast), data)
    assert data.tokenizer_name == str(policy()) and data.answer_sides == ("chosen",)
    trainer(tmp_path).fit(DPO(str(policy()), optimizer=fast), data)  # the same data for the next stage
    assert data.answer_sides == ("chosen", "rejected")
    with pytest.raises(ValueError, match="expected none, got 'quickstart'"):
        trainer(tmp_path).fit(DPO(str(policy())), HHRLHF(str(pairs()), tokenizer="quickstart"))
    with pytest.raises(ValueError, match="pass the data to a Trainer first, or name a tokenizer"):
        HHRLHF(str(pairs())).prepare_data()


def test_defaults_are_those_of_the_command_line(data: HHRLHF, tmp_path: Path) -> None:
    model = DPO(str(policy()))
    run = trainer(tmp_path, max_steps=1)
    run.fit(model, data)
    (group,) = run.optimizers[0].param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-6, 0.0)


def test_the_preflight_runs_in_any_trainer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = HHRLHF(str(pairs()), max_length=1024)
    with pytest.raises(RuntimeError, match="at most the 256 positions that the policy supports"):
        trainer(tmp_path).fit(DPO(str(policy())), long)


class Squared(PreferenceLoss):
    """A user's own loss: twenty lines, no registration."""

    beta = 0.5
    uses_reference = True
    uses_margins = False
    needs_whole_batch = False
    initial_loss = 1.0
    reward_scale = 0.5

    def __call__(self, logps: PairLogps) -> torch.Tensor:
        h = self.beta * (logps.logratios[:, 0] - logps.logratios[:, 1])
        return (h - 1) ** 2

    def rewards(self, logps: PairLogps) -> torch.Tensor:
        return self.beta * logps.logratios.detach()


def test_a_loss_of_ones_own_and_a_loader_of_examples(tmp_path: Path, fast: partial) -> None:
    draw = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(5, 100, (n,), generator=draw).tolist()

    examples = [Example(f"mine:{i}", ids(6), (ids(4), ids(3))) for i in range(8)]
    loader = DataLoader(examples, batch_size=4, collate_fn=list)
    model = DPO(str(policy()), loss=Squared(), optimizer=fast)
    before = model.losses  # bound, to show that nothing is registered
    assert before
    run = trainer(tmp_path, max_steps=4)
    run.fit(model, loader, loader)
    (measured,) = run.validate(model, loader, verbose=False)
    assert measured["val/loss"] < 1


def test_lora_trains_alone(data: HHRLHF, tmp_path: Path, fast: partial) -> None:
    pytest.importorskip("peft")
    model = DPO(str(policy()), adapter=LoRA(r=4), optimizer=fast)
    trainer(tmp_path).fit(model, data)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_losses_of_four_log_probabilities() -> None:
    sums = [torch.tensor(values) for values in ([-10.0, -3.0], [-12.0, -3.0], [-11.0, -3.0], [-11.0, -3.0])]
    logps = PairLogps.from_sums(*sums)
    h = torch.tensor([2.0, 0.0])  # (lp_w - lp_l) - (ref_w - ref_l)
    torch.testing.assert_close(losses.DPO(beta=0.1)(logps), -torch.nn.functional.logsigmoid(0.1 * h))
    for loss in (losses.SimPO(), losses.LD(losses.DPO()), losses.WPO(losses.DPO())):
        with pytest.raises(ValueError, match=r"needs values of single tokens|needs the lengths"):
            loss(logps)
    sized = PairLogps.from_sums(*sums, lengths=torch.tensor([[5, 4], [3, 3]]))
    expected = -torch.nn.functional.logsigmoid(torch.tensor([2 * (-2.0 + 3.0) - 1, -1.0]))
    torch.testing.assert_close(losses.SimPO()(sized), expected)


MISTAKES = {
    "DPO(AutoModelForCausalLM.from_pretrained(policy))": "policy: expected a folder or hub id, got a LlamaForCausalLM",
    "DPO(loss='ipo')": "loss: expected an object such as losses.DPO(beta=0.1), got 'ipo'",
    "DPO(policy).generate('Hi')": "generate: expected a list of prompts, got the text 'Hi'",
    "DPO(policy).rewards('Hi', 'Yes.')": "rewards: expected a list of answers, got the text 'Yes.'",
}


def test_what_is_easily_mistaken_is_said() -> None:
    """In a process of its own, as in the tests shapes and types are checked at every call."""
    code = f"""
from transformers import AutoModelForCausalLM
from dpo import DPO
policy = {str(policy())!r}
for code, message in {MISTAKES!r}.items():
    try:
        eval(code)
    except TypeError as error:
        assert message in str(error), error
    else:
        raise AssertionError(code)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_is_imported_quickly_and_lists_its_names() -> None:
    code = "import time; t = time.perf_counter(); import dpo; print(time.perf_counter() - t)"
    times = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3)]
    assert min(times) < 0.3
    assert {"DPO", "HHRLHF", "LoRA", "losses"} <= set(dir(dpo))
    with pytest.raises(AttributeError, match="has no attribute 'KTO'"):
        dpo.KTO  # noqa: B018


def fit_in_parts(folder: Path, data: HHRLHF, stops: list[dict[str, object]], **options: object) -> DPO:
    """Fit with Lightning's default checkpoints, one trainer after the other, each from where the last one stopped."""
    path = None
    for number, stop in enumerate(stops):
        model = DPO(str(policy()), optimizer=partial(torch.optim.AdamW, lr=1e-3))
        run = trainer(folder / str(number), **{**options, **stop})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The dirpath has changed")  # one folder each, on purpose
            run.fit(model, data, ckpt_path=path)
        path = run.checkpoint_callback.best_model_path
    return model


@pytest.mark.parametrize("stops", [[3, 8], [6, 8], [4, 6, 8], [1, 2, 3, 5, 8]], ids=str)
def test_default_checkpoints_resume_the_very_run(tmp_path: Path, data: HHRLHF, stops: list[int]) -> None:
    """Lightning saves them after an epoch, also after one that `max_steps` has cut short."""
    options = {"limit_train_batches": 4, "max_epochs": -1}
    whole = fit_in_parts(tmp_path / "whole", data, [{"max_steps": 8}], **options)
    parts = fit_in_parts(tmp_path / "parts", data, [{"max_steps": stop} for stop in stops], **options)
    for name, value in whole.policy.named_parameters():
        assert torch.equal(value, parts.policy.get_parameter(name)), name


def test_a_model_is_fitted_twice(data: HHRLHF, tmp_path: Path, fast: partial) -> None:
    model = DPO(str(policy()), optimizer=fast)
    for name in ("first", "second"):
        trainer(tmp_path / name).fit(model, data)
    copied = copy.deepcopy(model)
    assert copied.rewards("How?", ["Yes."]) == model.rewards("How?", ["Yes."])


def test_saving_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    DPO(str(policy())).save_pretrained(tmp_path)
    DPO(str(policy())).save_pretrained(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert AutoModelForCausalLM.from_pretrained(tmp_path) is not None


class Reduced(losses.PreferenceLoss):
    """A loss that forgets that there are several pairs."""

    def __call__(self, logps: PairLogps) -> torch.Tensor:
        return logps.logratios.sum()


def test_a_loss_that_reduces_is_refused(data: HHRLHF, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected one value for each of 4 pairs, got a tensor of shape \(\)"):
        trainer(tmp_path).fit(DPO(str(policy()), loss=Reduced(), preflight=False), data)


@pytest.mark.parametrize(("stage", "answers"), [(DPO, 1), (DPO, 4), (SFT, 2)])
def test_examples_with_other_numbers_of_answers_are_refused(tmp_path: Path, stage: type, answers: int) -> None:
    loader = DataLoader([Example("x:1", [5, 6], ([7, 8],) * answers)] * 4, batch_size=2, collate_fn=list)
    with pytest.raises(ValueError, match=rf"x:1: expected one answer for each of .*, got {answers} answers"):
        trainer(tmp_path).fit(stage(str(policy()), preflight=False), loader, loader)


def test_a_checkpoint_of_another_stage_says_so(data: HHRLHF, tmp_path: Path, fast: partial) -> None:
    run = trainer(tmp_path)
    run.fit(DPO(str(policy()), optimizer=fast), data)
    with pytest.raises(ValueError, match="is a checkpoint of DPO, not of SFT"):
        SFT.load_from_checkpoint(run.checkpoint_callback.best_model_path)

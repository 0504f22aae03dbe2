"""Setups that are broken on purpose: each is refused before the first step, with a message that says what to do."""

import math
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from dpo import quickstart
from dpo.losses import DPO, PairLogps
from dpo.models.batch import Batch, Example
from dpo.models.loading import ModelLoader
from dpo.models.reference import DISTANCE_NONE, FrozenReference, Reference
from dpo.runs.folder import Run
from dpo.training import preflight
from dpo.training.preflight import PreflightError
from tests.support.models import make_tiny_model
from tests.support.runs import Lab, metrics, policy, write


class NotFrozenReference(FrozenReference):
    """A reference whose parameters still require a gradient."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, "broken on purpose", DISTANCE_NONE)
        self.model.requires_grad_(True)


@dataclass(frozen=True)
class Itself(Reference):
    """The policy itself, not frozen."""

    def build_reference(self, policy: PreTrainedModel, loader: ModelLoader) -> NotFrozenReference:
        return NotFrozenReference(policy)


@dataclass(frozen=True)
class Unfrozen(Reference):
    """A copy of the policy that is not frozen."""

    def build_reference(self, policy: PreTrainedModel, loader: ModelLoader) -> NotFrozenReference:
        return NotFrozenReference(loader.load_model(policy.config._name_or_path))


@dataclass(frozen=True)
class FreezesPolicy(Reference):
    """The policy itself, frozen."""

    def build_reference(self, policy: PreTrainedModel, loader: ModelLoader) -> FrozenReference:
        return FrozenReference(policy, "broken on purpose", DISTANCE_NONE)


@dataclass(frozen=True)
class Moved(Reference):
    """A copy of the policy with other weights."""

    def build_reference(self, policy: PreTrainedModel, loader: ModelLoader) -> FrozenReference:
        model = loader.load_model(policy.config._name_or_path)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.01)
        return FrozenReference(model, "broken on purpose", DISTANCE_NONE)


@dataclass(frozen=True)
class Dropout(Reference):
    """A correct copy of a policy whose dropout stays on."""

    def build_reference(self, policy: PreTrainedModel, loader: ModelLoader) -> FrozenReference:
        frozen = FrozenReference(loader.load_model(policy.config._name_or_path), "a copy", DISTANCE_NONE)
        policy.train()
        return frozen


@dataclass(frozen=True)
class Shifted(DPO):
    """DPO plus a constant, with the initial loss of DPO."""

    def __call__(self, logps: PairLogps) -> Tensor:
        return super().__call__(logps) + 0.01


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("runs"))


ONE = ["--trainer.max_steps=1", "--data.val_fraction=0"]


def refused(lab: Lab, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the error message of a run that is stopped before its first step."""
    capsys.readouterr()
    name = f"run{len(list(lab.folder.iterdir()))}"
    assert lab.main("fit", f"--name={name}", *ONE, *words) == 1
    run = Run(lab.folder / name)
    assert not run.metrics_path.exists() and not run.checkpoint_folder.exists()
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("broken", ["Itself", "Unfrozen"])
def test_a_reference_that_would_train(lab: Lab, capsys: pytest.CaptureFixture[str], broken: str) -> None:
    message = refused(lab, capsys, f"--model.reference=tests.training.test_preflight.{broken}")
    assert "preflight: the reference: expected frozen parameters that are not in the optimizer, got ['" in message
    assert "Use a copy of the policy, not the policy itself." in message


def test_a_policy_that_does_not_train(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(lab, capsys, "--model.reference=tests.training.test_preflight.FreezesPolicy")
    assert "the policy is frozen: expected parameters that need a gradient, got none." in message


def test_a_reference_that_is_not_the_policy(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(lab, capsys, "--model.reference=tests.training.test_preflight.Moved")
    assert "log-probabilities under the policy and under a reference that should equal it: expected" in message
    assert "The reference is not a copy of the policy." in message


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"attention_dropout": 0.5}),  # functional dropout, which no nn.Dropout shows
        ("gpt2", {"resid_pdrop": 0.5}),
    ],
)
def test_dropout_that_is_on(
    lab: Lab, capsys: pytest.CaptureFixture[str], family: str, config: dict[str, float]
) -> None:
    words = [f"--model.policy={policy(family, **config)}", "--model.sharing=false"]
    message = refused(lab, capsys, *words, "--model.reference=tests.training.test_preflight.Dropout")
    assert "preflight: two forward passes over one batch: expected equal log-probabilities, got a " in message
    assert "Turn off dropout and noise in the model." in message


def test_dropout_in_a_configuration_is_off(lab: Lab) -> None:
    lab.fit("dropout", *ONE, f"--model.policy={policy('gpt2', resid_pdrop=0.5)}")


def test_a_loss_that_differs_from_its_initial_loss(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(lab, capsys, "--model.loss=tests.training.test_preflight.Shifted")
    assert "preflight: the loss at step 0: expected 0.693147, got [0.7031" in message
    assert "The loss differs from its own `initial_loss`: correct one of them." in message


def test_prompts_are_not_shared_if_that_changes_hidden_states(
    lab: Lab, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[Batch] = []

    def differ(_: PreTrainedModel, batch: Batch) -> float:
        compared.append(batch)
        return 0.5

    monkeypatch.setattr(preflight, "sharing_error", differ)
    shared, alone = (lab.fit(name, *ONE, *words) for name, words in (("s", []), ("a", ["--model.sharing=false"])))
    assert "prompts are NOT shared between answers, as hidden states would differ by 5.0e-01" in caplog.text
    assert metrics(shared)[0]["train/loss"] == metrics(alone)[0]["train/loss"]
    (batch,) = compared  # the run without sharing has nothing to compare
    assert len(batch) == 4  # a whole step: --data.batch_size of the lab


def test_a_model_that_is_not_causal(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(lab, capsys, f"--model.policy={policy('bert')}")
    assert "preflight: hidden states with and without the next token: expected a relative difference of " in message
    assert "at most 0.0001, got " in message
    assert "it is not a causal language model." in message


def test_logits_that_depend_on_more_than_hidden_states(
    lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LlamaForCausalLM.forward

    def warmer(self: LlamaForCausalLM, input_ids: Tensor, **options: Any) -> Any:
        output = forward(self, input_ids=input_ids, **options)
        output.logits = output.logits * (1.0 + input_ids[:, -1:, None] / 10)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", warmer)
    message = refused(lab, capsys)
    assert "log-probabilities by the scorer and by the model's own forward pass: expected a difference of" in message
    assert "This model computes logits in a way the scorer cannot reproduce: use another model." in message


def test_a_model_that_cannot_be_scored(
    lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise IndexError("list index out of range")

    path = f"--model.policy={policy()}"
    monkeypatch.setattr(LlamaForCausalLM, "forward", broken)
    message = refused(lab, capsys, path)
    assert message == "error: LlamaForCausalLM cannot be scored: IndexError: list index out of range"


def test_more_tokens_than_the_policy_has_positions(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(lab, capsys, "--data.max_length=300")
    assert "--data.max_length: expected at most the 256 positions that the policy supports, got 300." in message


def saved(folder: Path, rows: int | None = None, value: float | None = None, unused: int = 0) -> str:
    """Save a policy and return the option that selects it.

    Args:
        folder: Where to save it.
        rows: Rows of its embedding; by default one per token.
        value: A value to put into its weights.
        unused: Number of tokens to add to the tokenizer that no text is encoded to.
    """
    tokens = AutoTokenizer.from_pretrained(quickstart.POLICY_FOLDER)
    model = make_tiny_model(vocab_size=rows or len(tokens), num_hidden_layers=1)
    tokens.add_tokens([f"<unused {i}>" for i in range(unused)])
    if value is not None:
        model.lm_head.weight.data[0, 0] = value
    tokens.save_pretrained(folder)
    model.save_pretrained(folder)
    return f"--model.policy={folder}"


def test_a_tokenizer_that_is_larger_than_the_embedding(
    lab: Lab, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    message = refused(lab, capsys, saved(tmp_path, rows=100))
    tokens = len(AutoTokenizer.from_pretrained(quickstart.POLICY_FOLDER))
    assert "the vocabulary: expected token ids below the 100 rows of the policy's embedding" in message
    assert f"from a tokenizer of {tokens:,} tokens" in message


def test_tokens_that_no_text_is_encoded_to_need_no_row(lab: Lab, tmp_path: Path) -> None:
    lab.fit("unused", *ONE, saved(tmp_path, unused=2))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(
    lab: Lab, capsys: pytest.CaptureFixture[str], tmp_path: Path, value: float
) -> None:
    message = refused(lab, capsys, saved(tmp_path, value=value))
    assert "the weights: expected finite numbers, got nan or inf in ['policy lm_head.weight'" in message


def test_an_end_of_sequence_inside_an_answer() -> None:
    with pytest.raises(PreflightError, match=r"the answers of a/train:1: expected no end-of-sequence .*, got \[2\]\."):
        list(preflight._check_answers([Example("a/train:1", [5], ([6, 2, 7, 2], [8, 2]))], (2,)))


def test_answers_that_are_the_same() -> None:
    with pytest.raises(PreflightError, match=r"different token ids, got the same ids\. Raise --data\.max_length"):
        list(preflight._check_answers([Example("a/train:1", [5], ([6, 2], [6, 2]))], (2,)))


def test_every_message_says_how_to_skip_the_checks(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(lab, capsys, "--model.loss=tests.training.test_preflight.Shifted")
    assert message.startswith("error: preflight: ")
    assert message.endswith("(--model.preflight false skips all checks.)")
    run = lab.fit("regardless", *ONE, "--model.loss=tests.training.test_preflight.Shifted", "--model.preflight=false")
    assert metrics(run)[0]["train/loss"] == pytest.approx(log(2) + 0.01)


def test_a_good_run_says_what_was_checked(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    lab.fit("good", *ONE)
    (logged,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Preflight: ")]
    for part in ("every answer ends once", "all others are frozen", "bitwise identical", "the loss is 0.693147"):
        assert part in logged


def test_fewer_rows_than_are_checked_are_enough(lab: Lab, tmp_path) -> None:
    row = ("\n\nHuman: Hi.\n\nAssistant: Hello.", "\n\nHuman: Hi.\n\nAssistant: No.")
    write(tmp_path, (row,), (row,))
    lab.fit("few", *ONE, f"--data.path={tmp_path}", "--data.batch_size=1")

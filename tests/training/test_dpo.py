"""The DPO stage against the definition of DPO, computed here from a plain model, one sequence at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo.data.sampler import Step
from dpo.losses import CPO
from dpo.losses import DPO as Loss
from dpo.models.batch import Batch, Example, collate
from dpo.models.reference import Copy, Model, Nothing
from dpo.training.dpo import DPO, resolve_reference
from tests.support.models import make_tiny_model
from tests.support.runs import policy

BETA = 0.3
EXAMPLES = [
    Example("a", [3, 4, 5, 6], ([7, 8, 9, 2], [10, 2])),
    Example("b", [11, 12], ([13, 2], [14, 15, 16, 17, 2])),
    Example("c", [18], ([19, 2], [20, 2])),
]


@pytest.fixture
def module() -> DPO:
    """A stage whose policy and reference differ."""
    stage = DPO(policy=str(policy()), reference=str(policy(seed=1)), loss=Loss(BETA))
    stage.configure_model()
    return stage


def logp(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> Tensor:
    """Return log p(answer | prompt), by the chain rule."""
    ids = torch.tensor([*prompt, *answer])
    logps = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    return logps[len(prompt) - 1 :].sum()


def by_definition(model: PreTrainedModel, other: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return -log sigmoid(beta * (log-ratio of chosen - log-ratio of rejected)) and beta * log-ratios of every pair."""
    rewards = torch.stack(
        [BETA * (logp(model, e.prompt, a) - logp(other, e.prompt, a).detach()) for e in EXAMPLES for a in e.answers]
    ).unflatten(0, (-1, 2))
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards.detach()


def test_losses_rewards_and_gradients_are_those_of_the_definition(module: DPO) -> None:
    plain = AutoModelForCausalLM.from_pretrained(policy())
    expected, rewards = by_definition(plain, AutoModelForCausalLM.from_pretrained(policy(seed=1)))
    expected.sum().backward()

    batch = collate(EXAMPLES)
    losses = module.losses(batch, module.train_means)
    losses.sum().backward()
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    _, logps = module.score_pairs(batch)
    torch.testing.assert_close(module.loss.rewards(logps), rewards, rtol=1e-4, atol=1e-4)
    gradients = dict(module.policy.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for p in module.reference.parameters())
    assert module.train_means.compute()["loss"].item() == pytest.approx(expected.mean().item(), rel=1e-5)


def test_predictions_are_log_probabilities_and_rewards(module: DPO) -> None:
    plain, other = (AutoModelForCausalLM.from_pretrained(policy(seed=seed)) for seed in (0, 1))
    _, rewards = by_definition(plain, other)
    with torch.no_grad():
        rows = module.predict_step(Step((collate(EXAMPLES[:2]), collate(EXAMPLES[2:])), 3, 0), 0)
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    for row, example, reward in zip(rows, EXAMPLES, rewards.tolist(), strict=True):
        assert row["rewards"] == pytest.approx(reward, rel=1e-3, abs=1e-4)
        assert row["logps"] == pytest.approx([logp(plain, example.prompt, a).item() for a in example.answers], rel=1e-4)


def test_checkpoints_hold_the_policy_alone(module: DPO) -> None:
    names = set(module.state_dict())
    assert names == {f"policy.{name}" for name, _ in module.policy.named_parameters()}


def test_weights_of_another_model_are_refused(module: DPO) -> None:
    state = module.state_dict()
    other = DPO(policy=str(policy(seed=2)), reference=str(policy(seed=1)))
    other.configure_model()
    other.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    name = "policy.model.norm.weight"
    with pytest.raises(ValueError, match=rf"weights missing \['{name}'\], unexpected \['more'\]"):
        other.load_state_dict({**{n: v for n, v in state.items() if n != name}, "more": state[name]})


def test_a_checkpoint_of_another_reference_is_refused(module: DPO) -> None:
    module.check_checkpoint({"reference_sha256": module.reference.sha256})
    with pytest.raises(ValueError, match=r"SHA-256 0123456789abcdef, this one has .*--model\.reference"):
        module.check_checkpoint({"reference_sha256": "0123456789abcdef" * 4})
    with pytest.raises(ValueError, match=r"of no preference stage.*--model\.policy runs/NAME/export"):
        module.check_checkpoint({})


def test_models_are_loaded_once(module: DPO) -> None:
    before = module.policy, module.reference
    module.configure_model()
    assert (module.policy, module.reference) == before


def test_the_default_reference_depends_on_the_loss() -> None:
    assert resolve_reference(None, Loss()) == Copy()
    assert resolve_reference(None, CPO()) == Nothing()
    assert resolve_reference("x", Loss()) == Model("x")
    with pytest.raises(ValueError, match="needs a reference"):
        resolve_reference(Nothing(), Loss())
    with pytest.raises(ValueError, match="takes no reference"):
        resolve_reference("x", CPO())


def test_a_model_that_cannot_share_prompts_computes_every_answer_alone_and_logs_it(
    tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    make_tiny_model("bloom").save_pretrained(tmp_path)
    module = DPO(policy=str(tmp_path))
    module.configure_model()
    batch: Batch = collate(EXAMPLES)
    with torch.no_grad():
        assert torch.equal(module.loss.rewards(module.score_pairs(batch)[1]), torch.zeros(3, 2))
    assert "Prompts are not shared between the answers of the policy: " in caplog.text

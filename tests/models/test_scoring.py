"""The scorer's values against their definitions, and the tensors that it must never allocate."""

from math import log

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpo.losses.base import sum_per_answer
from dpo.models import scoring
from dpo.models.batch import Example, collate
from dpo.models.prompt_sharing import enable_prefix_sharing
from dpo.models.scoring import _TokenLogps, score
from tests.support.sharing import SHARED, SIZES, build, random_batch


def test_zero_logits_give_the_log_of_the_vocabulary_size() -> None:
    values, entropy, mean, hits, collision = _TokenLogps.apply(torch.zeros(2, 16), torch.tensor([3, 0]))
    assert -values.sum().item() == pytest.approx(2 * log(16))  # NLL of two tokens: 2 ln 16
    assert entropy.tolist() == pytest.approx([log(16)] * 2)
    assert collision.tolist() == pytest.approx([log(16)] * 2)  # -log(16 / 16^2)
    assert mean.tolist() == [0, 0]
    assert hits.tolist() == [0, 1]  # the first of equals counts as the most probable


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_one_pass_equals_the_definitions(scale: float) -> None:
    logits = scale * torch.randn(50, 97, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(50)
    reference = logits.double().log_softmax(-1)
    values, entropy, mean, hits, collision = _TokenLogps.apply(logits, targets)
    expected = reference.gather(-1, targets[:, None])[:, 0].float()
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=4e-7 * scale + 1e-6)
    torch.testing.assert_close(entropy, -(reference.exp() * reference).nansum(-1).float(), rtol=1e-4, atol=1e-6 * scale)
    torch.testing.assert_close(mean, logits.mean(-1))
    squares = -(2 * reference).logsumexp(-1).float()  # -log sum p^2
    torch.testing.assert_close(collision, squares, rtol=1e-5, atol=1e-6)
    assert torch.equal(hits, (logits.argmax(-1) == targets).float())


def test_the_gradient_is_that_of_log_softmax() -> None:
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets, weights = torch.tensor([0, 3, 5, 5, 10, 2]), torch.linspace(-2, 3, 6)
    found = torch.autograd.grad(_TokenLogps.apply(logits, targets)[0] @ weights, logits)
    expected = torch.autograd.grad(logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0] @ weights, logits)
    torch.testing.assert_close(found, expected)


def test_scores_are_float32_under_autocast() -> None:
    logits = torch.randn(6, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(6)
    with torch.autocast("cpu", torch.bfloat16):  # the logits stay bfloat16, everything after them is float32
        found = _TokenLogps.apply(logits, targets)
    expected = _TokenLogps.apply(logits.double().float(), targets)
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)


def test_the_sum_of_an_answer_does_not_depend_on_other_answers() -> None:
    batch = random_batch()
    values = torch.randn(len(batch.targets))
    sums = sum_per_answer(values, batch.lengths)
    starts = [sum(batch.lengths[:i]) for i in range(len(batch.lengths))]
    for i, (start, length) in enumerate(zip(starts, batch.lengths, strict=True)):
        assert sums[i] == values[start : start + length].sum()


def test_sums_per_answer_worked_out_by_hand() -> None:
    batch = collate([Example("a", [1], ([2, 3, 4, 5], [6]))])
    assert sum_per_answer(torch.tensor([-1.0, -2.0, -3.0, -4.0, -7.0]), batch.lengths).tolist() == [-1 - 2 - 3 - 4, -7]


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2"])
def test_chunks_of_the_head_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(family, SHARED[family]), random_batch()
    enable_prefix_sharing(model)
    whole = score(model, batch)
    wanted = torch.autograd.grad(whole.logps.sum(), list(model.parameters()), allow_unused=True)
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 97 * 5)  # five positions at a time
    cut = score(model, batch)
    found = torch.autograd.grad(cut.logps.sum(), list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(cut.logps, whole.logps)
    torch.testing.assert_close(cut.entropy, whole.entropy)
    for f, w in zip(found, wanted, strict=True):
        assert (f is None) == (w is None)
        if w is not None:
            torch.testing.assert_close(f, w, rtol=1e-4, atol=1e-5)


class LargestLogits(TorchDispatchMode):
    """Records the rows of the largest tensor with a vocabulary dimension that any operation returns."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.rows = 0
        self.weights = (SIZES["hidden_size"], vocabulary)  # the head itself, transposed

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))  # type: ignore[operator]
        for tensor in out if isinstance(out, tuple | list) else [out]:
            wide = isinstance(tensor, Tensor) and tensor.dim() >= 2 and tensor.shape[-1] == self.vocabulary
            if wide and tuple(tensor.shape) != self.weights:
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return out


def test_no_tensor_of_all_tokens_by_the_vocabulary_ever_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build("llama", {"vocab_size": 997}), random_batch()  # a size that nothing else has
    enable_prefix_sharing(model)
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 997 * 8)
    with LargestLogits(997) as seen:
        score(model, batch).logps.sum().backward()
    assert 0 < seen.rows <= 8 < len(batch.targets) < len(batch.tokens)


def test_whatever_replaces_the_head_is_part_of_the_scores() -> None:
    model, batch = build("llama", {}), random_batch()
    enable_prefix_sharing(model)
    before = score(model, batch).logps
    head = model.lm_head
    model.lm_head = nn.Sequential(head, nn.Linear(97, 97, bias=False))
    model.lm_head.weight = head.weight
    assert not torch.allclose(score(model, batch).logps, before)


def test_sums_of_bfloat16_scores_are_float32() -> None:
    # near -2,500 bfloat16 has a resolution of 16, which would swallow the margins between answers
    batch = random_batch()
    assert sum_per_answer(torch.randn(len(batch.targets), dtype=torch.bfloat16), batch.lengths).dtype == torch.float32

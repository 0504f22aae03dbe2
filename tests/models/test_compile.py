"""Compiled layers: the same numbers, and few compilations however batch lengths vary."""

import random
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from dpo.data.tokenization import PairEncoder
from dpo.models.batch import Batch, Example, collate
from dpo.models.generation import GREEDY_SAMPLING, generate_answers
from dpo.models.loading import ModelLoader, prepare_layers
from dpo.models.prompt_sharing import enable_prefix_sharing
from dpo.models.scoring import score
from tests.support.runs import policy
from tests.support.sharing import build


def batch_of(pairs: int, seed: int) -> Batch:
    draw = random.Random(seed)

    def tokens() -> list[int]:
        return [draw.randrange(3, 97) for _ in range(draw.randint(2, 30))]

    return collate([Example(str(i), tokens(), (tokens(), tokens())) for i in range(pairs)])


@pytest.mark.filterwarnings("ignore")  # the compiler warns about itself
@pytest.mark.slow  # torch's compiler takes half a minute on one core
def test_one_compilation_serves_every_batch() -> None:
    model = build("llama", {"num_hidden_layers": 2})
    enable_prefix_sharing(model)
    batches = [batch_of(3 + i, i) for i in range(6)]
    expected = [score(model, batch).logps for batch in batches]
    prepare_layers(model, compile_layers=True, gradient_checkpointing=False)
    torch._dynamo.reset()
    counters.clear()
    compiled = []
    for batch, logps in zip(batches, expected, strict=True):
        found = score(model, batch).logps
        found.sum().backward()
        torch.testing.assert_close(found, logps, rtol=1e-4, atol=1e-4)
        compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[-1] == compiled[1] <= 8  # the parts before and after the attention, for any length


@pytest.mark.filterwarnings("ignore")  # the compiler warns about itself
@pytest.mark.slow  # torch's compiler takes half a minute on one core
def test_layers_run_the_same_kernels_with_and_without_recomputation() -> None:
    reference, policy = (build("llama", {"num_hidden_layers": 2}) for _ in range(2))
    policy.load_state_dict(reference.state_dict())
    for model, recomputed in ((reference, False), (policy, True)):
        enable_prefix_sharing(model)
        prepare_layers(model, compile_layers=True, gradient_checkpointing=recomputed)
    for seed in range(3):
        batch = batch_of(3 + seed, seed)
        torch.testing.assert_close(score(policy, batch).logps, score(reference, batch).logps, rtol=0, atol=0)
        for model in (policy, reference):
            model.zero_grad()
            score(model, batch).logps.sum().backward()
        for p, q in zip(policy.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # imported by torch's own compiler
def test_answers_are_generated_without_compilation() -> None:
    loader = ModelLoader()
    model, encoder = loader.load_model(str(policy())), PairEncoder(loader.load_tokenizer(str(policy())), 64)
    enable_prefix_sharing(model)
    prepare_layers(model, compile_layers=True, gradient_checkpointing=False)
    torch._dynamo.reset()
    counters.clear()
    generate_answers(model, encoder, [[3, 4, 5]], replace(GREEDY_SAMPLING, max_new_tokens=3), seed=0)
    assert counters["stats"]["unique_graphs"] == 0

"""Shared prompts change nothing: against the plain forward pass of `transformers`, sequence by sequence."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo.models.attention import PREFIX_SHARED_NAME, NotShareableError
from dpo.models.batch import Batch, Example, collate
from dpo.models.loading import ModelLoader, prepare_layers
from dpo.models.prompt_sharing import enable_prefix_sharing, share_if_exact, standard_attention, weight_sharing_copy
from dpo.models.scoring import score
from tests.support.models import make_tiny_model
from tests.support.sharing import DYNAMIC, GPT2_SIZES, LLAMA4, LONGROPE, MULTIMODAL, SHARED, build, random_batch

SEPARATE: dict[str, dict[str, Any]] = {
    "llama-dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}},
    "phi3-long": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 40},
    "gemma3-dynamic": {
        **MULTIMODAL,
        "text_config": {**MULTIMODAL["text_config"], "rope_parameters": {"full_attention": DYNAMIC}},
    },
    "bloom": GPT2_SIZES,  # ALiBi
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4},
    "gptj": {**GPT2_SIZES, "rotary_dim": 4},
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 8},
    "mamba": {},
    "jamba": {},  # hybrid
    "recurrent_gemma": {"attention_window_size": 8},
    "llama4_text-tuned": LLAMA4,  # attention scaled by the index in the row, from 8192 on
    "stablelm": {},  # does not pass the layout on to its attention
}


def separate_logps(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return log-probabilities as in a textbook: from all logits of whole sequences."""
    parts = []
    ends = torch.tensor(batch.lengths).cumsum(0).tolist()
    for tokens, end, scored in zip(batch.answer_sequences(), ends, batch.lengths, strict=True):
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, -scored:].float()
        parts.append(logits.log_softmax(-1).gather(-1, batch.targets[end - scored : end, None])[:, 0])
    return torch.cat(parts)


def gradients(loss: Tensor, model: PreTrainedModel) -> list[Tensor]:
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [g for g in torch.autograd.grad(loss, wanted, allow_unused=True) if g is not None]


@pytest.mark.parametrize("name", SHARED)
def test_shared_equals_separate_in_values_and_gradients(name: str) -> None:
    model, batch = build(name, SHARED[name]), random_batch()
    weights = torch.linspace(-1, 1, len(batch.targets))  # a different gradient for every token
    expected = separate_logps(model, batch)
    wanted = gradients(expected @ weights, model)
    assert share_if_exact(model) == ""
    assert model.config._attn_implementation == PREFIX_SHARED_NAME
    scores = score(model, batch)
    found = gradients(scores.logps @ weights, model)
    torch.testing.assert_close(scores.logps, expected, rtol=1e-5, atol=2e-5)
    scale = max(g.abs().max().item() for g in wanted)
    assert max((f - w).abs().max().item() for f, w in zip(found, wanted, strict=True)) <= 1e-5 * scale


@pytest.mark.parametrize("name", SEPARATE)
def test_models_that_cannot_share_keep_separate_sequences_and_say_why(name: str) -> None:
    model, batch = build(name, SEPARATE[name]), random_batch()
    before = model.config._attn_implementation
    reason = share_if_exact(model)
    assert reason and model.config._attn_implementation == before
    torch.testing.assert_close(score(model, batch).logps, separate_logps(model, batch), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", SHARED)
@torch.no_grad()
def test_without_a_layout_logits_are_those_of_before(name: str) -> None:
    """On ordinary rows, one of them padded, the model computes the same whether or not it can share prompts."""
    model = build(name, SHARED[name])
    ids = torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    real = mask.bool()
    expected = model(input_ids=ids, attention_mask=mask).logits[real]
    enable_prefix_sharing(model)
    found = model(input_ids=ids, attention_mask=mask).logits[real]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def test_standard_attention_is_that_of_transformers_and_ends_with_the_block() -> None:
    model = build("llama", {})
    ids = torch.tensor([[1, 5, 9, 4]])
    expected = model(input_ids=ids).logits
    enable_prefix_sharing(model)
    with standard_attention(model):
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert model.config._attn_implementation == PREFIX_SHARED_NAME


def test_dynamic_frequencies_depend_on_the_sequence_and_not_on_the_longest_so_far() -> None:
    options = {"rope_parameters": DYNAMIC, "max_position_embeddings": 20}
    draw = random.Random(0)
    prompts = ([draw.randrange(3, 97) for _ in range(n)] for n in (50, 25, 10))  # the last is short enough as it is
    examples = [Example(str(i), prompt, ([5, 9, 2],)) for i, prompt in enumerate(prompts)]
    expected = torch.cat([separate_logps(build("llama", options), collate([example])) for example in examples])
    torch.testing.assert_close(score(build("llama", options), collate(examples)).logps, expected, rtol=1e-5, atol=2e-5)


def test_a_weight_sharing_copy_has_rotary_frequencies_of_its_own() -> None:
    model = build("phi3", SEPARATE["phi3-long"])
    frequencies = model.model.rotary_emb.inv_freq
    before, other = frequencies.clone(), weight_sharing_copy(model)
    other(input_ids=torch.arange(50)[None] + 3)  # longer than 40: the long factors
    assert not torch.equal(other.model.rotary_emb.inv_freq, before)
    assert torch.equal(frequencies, before)


def test_attention_that_is_not_causal_is_refused() -> None:
    model = build("llama", {})
    enable_prefix_sharing(model)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(NotShareableError, match="not causal"):
        score(model, random_batch())


def test_recomputed_layers_attend_as_in_the_forward_pass() -> None:
    model, batch = build("llama", {}), random_batch()
    enable_prefix_sharing(model)
    wanted = gradients(score(model, batch).logps.sum(), model)
    prepare_layers(model, compile_layers=False, gradient_checkpointing=True)
    found = gradients(score(model, batch).logps.sum(), model)
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w)


def test_a_model_that_caps_scores_is_loaded_with_attention_that_does(tmp_path: Path) -> None:
    make_tiny_model("gemma2").save_pretrained(tmp_path)
    model = ModelLoader().load_model(str(tmp_path))
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("prefix_shared")
    with standard_attention(model):
        assert model.config._attn_implementation == "eager"

"""Shared prompts change nothing, for every family: against the plain forward of `transformers`, row by row."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dpo.attention import NAME
from dpo.batch import Batch, Example, collate
from dpo.logps import score
from dpo.masks import NotShareable
from dpo.models import adapt_layers
from dpo.sharing import plain, share, share_if_exact, twin

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OLD: dict[str, Any] = {"n_embd": 32, "n_head": 4, "n_layer": 4}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4}
LLAMA4: dict[str, Any] = {
    "head_dim": 8, "attention_chunk_size": 16, "intermediate_size_mlp": 48, "num_local_experts": 2
}  # fmt: skip
GEMMA4: dict[str, Any] = {
    "global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "final_logit_softcapping": 5.0,
}  # fmt: skip
SIGHT: dict[str, Any] = {  # of a model that could also see images
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip
SEES: dict[str, Any] = {"text_config": {**SIZES, "head_dim": 8, "sliding_window": 8}, "vision_config": SIGHT}
LONG = {
    "rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 40,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
# Windows are smaller than the sequences (up to 60 tokens), so that one ignored is seen.
SHARED: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "mistral": {"sliding_window": 8},
    "mixtral": {"sliding_window": 8, **EXPERTS},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gpt_neox": {},
    "gpt2": OLD,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {},
    "olmo2": {},
    "olmoe": EXPERTS,
    "smollm3": {},
    "cohere2": {"head_dim": 8, "sliding_window": 8, "logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
    "gpt_oss": {"head_dim": 8, "sliding_window": 8, **EXPERTS},
    "llama4_text": {**LLAMA4, "attn_temperature_tuning": False},
    "starcoder2": {"sliding_window": 8},
    "gemma3": SEES,
    "gemma4_text": {"head_dim": 8, "sliding_window": 8, **GEMMA4},
}
SEPARATE: dict[str, dict[str, Any]] = {
    "llama-dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}},
    "phi3-long": {"rope_parameters": LONG, "original_max_position_embeddings": 40},
    "gemma3-dynamic": SEES | {"text_config": SEES["text_config"] | {"rope_parameters": {"full_attention": DYNAMIC}}},
    "bloom": OLD,  # ALiBi
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4},
    "gptj": {**OLD, "rotary_dim": 4},
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 8},
    "mamba": {},
    "jamba": {},  # hybrid
    "recurrent_gemma": {"attention_window_size": 8},
    "llama4_text-tuned": LLAMA4,  # attention scaled by the place in the row, from place 8192 on
    "stablelm": {},  # keeps the layout from its attention
}


def build(name: str, options: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split("-")[0], **(SIZES | options))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def random_batch(pairs: int = 3, seed: int = 0) -> Batch:
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(3, 97) for _ in range(draw.randint(low, high))]

    # lengths from one token on: an answer of one token has an empty branch
    rows = [Example("short", tokens(1, 1), (tokens(1, 1), tokens(1, 1)))]
    rows += [Example(f"row:{i}", tokens(9, 40), (tokens(1, 20), tokens(1, 20))) for i in range(pairs)]
    return collate(rows)


def alone(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The log-probs by the textbook: whole sequences, whole logits."""
    parts = []
    ends = torch.tensor(batch.lengths).cumsum(0).tolist()
    for tokens, end, scored in zip(batch.sequences(), ends, batch.lengths, strict=True):
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, -scored:].float()
        parts.append(logits.log_softmax(-1).gather(-1, batch.targets[end - scored : end, None])[:, 0])
    return torch.cat(parts)


def gradients(loss: Tensor, model: PreTrainedModel) -> list[Tensor]:
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [g for g in torch.autograd.grad(loss, wanted, allow_unused=True) if g is not None]


@pytest.mark.parametrize("name", SHARED)
def test_shared_equals_alone_in_values_and_gradients(name: str) -> None:
    model, batch = build(name, SHARED[name]), random_batch()
    weights = torch.linspace(-1, 1, len(batch.targets))  # every token pulls differently
    expected = alone(model, batch)
    wanted = gradients(expected @ weights, model)
    assert share_if_exact(model) == ""
    assert model.config._attn_implementation == NAME
    scores = score(model, batch)
    found = gradients(scores.logps @ weights, model)
    torch.testing.assert_close(scores.logps, expected, rtol=1e-5, atol=2e-5)
    scale = max(g.abs().max().item() for g in wanted)
    assert max((f - w).abs().max().item() for f, w in zip(found, wanted, strict=True)) <= 1e-5 * scale


@pytest.mark.parametrize("name", SEPARATE)
def test_what_cannot_share_runs_alone_and_says_why(name: str) -> None:
    model, batch = build(name, SEPARATE[name]), random_batch()
    before = model.config._attn_implementation
    reason = share_if_exact(model)
    assert reason and model.config._attn_implementation == before
    torch.testing.assert_close(score(model, batch).logps, alone(model, batch), rtol=1e-5, atol=2e-5)


def test_a_shared_model_without_a_layout_refuses() -> None:
    model = build("llama", {})
    share(model)
    with pytest.raises(TypeError, match="layout"):
        model(input_ids=torch.tensor([[1, 2, 3]]))


def test_plain_gives_the_ordinary_model_back_for_a_while() -> None:
    model = build("llama", {})
    ids = torch.tensor([[1, 5, 9, 4]])
    expected = model(input_ids=ids).logits
    share(model)
    with plain(model):
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert model.config._attn_implementation == NAME


def test_dynamic_frequencies_are_those_of_the_sequence_not_of_the_longest_so_far() -> None:
    options = {"rope_parameters": DYNAMIC, "max_position_embeddings": 20}
    draw = random.Random(0)
    prompts = ([draw.randrange(3, 97) for _ in range(n)] for n in (50, 25, 10))  # the last is short enough as it is
    examples = [Example(str(i), prompt, ([5, 9, 2],)) for i, prompt in enumerate(prompts)]
    expected = torch.cat([alone(build("llama", options), collate([example])) for example in examples])
    torch.testing.assert_close(score(build("llama", options), collate(examples)).logps, expected, rtol=1e-5, atol=2e-5)


def test_what_a_twin_reads_leaves_the_frequencies_of_the_other() -> None:
    model = build("phi3", SEPARATE["phi3-long"])
    frequencies = model.model.rotary_emb.inv_freq
    before, other = frequencies.clone(), twin(model)
    other(input_ids=torch.arange(50)[None] + 3)  # longer than 40: the long factors
    assert not torch.equal(other.model.rotary_emb.inv_freq, before)
    assert torch.equal(frequencies, before)


def test_an_attention_that_looks_ahead_is_refused() -> None:
    model = build("llama", {})
    share(model)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(NotShareable, match="not causal"):
        score(model, random_batch())


def test_recomputed_layers_attend_as_in_the_forward_pass() -> None:
    model, batch = build("llama", {}), random_batch()
    share(model)
    wanted = gradients(score(model, batch).logps.sum(), model)
    adapt_layers(model, compiled=False, recomputed=True)
    found = gradients(score(model, batch).logps.sum(), model)
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w)

"""Small models of many families, and batches of random tokens for them."""

import random
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dpo.models.batch import Batch, Example, collate

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
GPT2_SIZES: dict[str, Any] = {"n_embd": 32, "n_head": 4, "n_layer": 4}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4}
LLAMA4: dict[str, Any] = {
    "head_dim": 8, "attention_chunk_size": 16, "intermediate_size_mlp": 48, "num_local_experts": 2
}  # fmt: skip
GEMMA4: dict[str, Any] = {
    "global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "final_logit_softcapping": 5.0,
}  # fmt: skip
VISION: dict[str, Any] = {  # of a model that also reads images
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip
MULTIMODAL: dict[str, Any] = {"text_config": {**SIZES, "head_dim": 8, "sliding_window": 8}, "vision_config": VISION}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 40,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
# Families that can share prompts. Windows are shorter than the sequences (up to 60 tokens), so that they matter.
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
    "gpt2": GPT2_SIZES,
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
    "gemma3": MULTIMODAL,
    "gemma4_text": {"head_dim": 8, "sliding_window": 8, **GEMMA4},
}


def build(name: str, options: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split("-")[0], **(SIZES | options))
    # as a model is loaded: sdpa, the default of older transformers, caps no scores
    attention = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention).eval()


def random_batch(pairs: int = 3, seed: int = 0) -> Batch:
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(3, 97) for _ in range(draw.randint(low, high))]

    # an answer of a single token has an empty branch
    rows = [Example("short", tokens(1, 1), (tokens(1, 1), tokens(1, 1)))]
    rows += [Example(f"row:{i}", tokens(9, 40), (tokens(1, 20), tokens(1, 20))) for i in range(pairs)]
    return collate(rows)

"""Small random models of several families."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

# Options of the configuration of each family, beyond the sizes that all share.
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"num_key_value_heads": 2},
    "gpt_neox": {},
    "gpt2": {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 8},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.1},
    "olmo2": {"num_key_value_heads": 2},
    "bloom": {},
    "bert": {},  # not causal
}


def make_tiny_model(
    family: str = "llama", *, vocab_size: int = 128, seed: int = 0, **config: object
) -> PreTrainedModel:
    """Make a random float32 model in eval mode with 2 layers and 4 heads of size 8; pad is 0, bos 1 and eos 2.

    The weights are ten times larger than usual, so that attention to a wrong token shows in the log-probabilities.
    """
    sizes: dict[str, object] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        configuration = AutoConfig.for_model(family, **(sizes | FAMILIES[family] | config))
        return AutoModelForCausalLM.from_config(configuration, dtype=torch.float32).eval()

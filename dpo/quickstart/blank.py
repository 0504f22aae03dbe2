"""A tokenizer and an untrained policy for the quickstart, made from nothing but a seed.

The result is a Hugging Face folder that can be trained; `python -m dpo quickstart` turns it into the shipped `policy/`
with the project's own supervised stage.
"""

from itertools import chain
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo.quickstart.generator import draw_rows

SFT_SEED = 20_230_529
"""Seed of the rows that the shipped policy was fine-tuned on, and of its initial weights."""

_CONTEXT_LENGTH = 512  # tokens, more than twice the longest generated dialogue
_VOCABULARY_SIZE = 1280
_PAD, _BOS, _EOS = "<pad>", "<s>", "</s>"
# A speaker's mark is one piece, and a word includes the space before it.
_PIECES = r"\n\n(?:Human|Assistant):| ?\w+| ?[^\w\s]+|\s+"


def _train_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY_SIZE,
        special_tokens=[_PAD, _BOS, _EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(chain.from_iterable(draw_rows(SFT_SEED, 4_000)), trainer)
    bos = (_BOS, core.token_to_id(_BOS))
    core.post_processor = processors.TemplateProcessing(single=f"{_BOS} $A", pair=f"{_BOS} $A $B", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_PAD,
        model_max_length=_CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def write_untrained_policy(folder: Path) -> None:
    """Write a byte-level BPE tokenizer and a Llama of about a million random weights, always the same ones.

    Args:
        folder: Folder to write to, made if needed; `AutoTokenizer` and `AutoModelForCausalLM` can load it afterwards.
    """
    tokenizer = _train_tokenizer()
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=_CONTEXT_LENGTH,
        tie_word_embeddings=True,
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SFT_SEED)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(max_new_tokens=64, **ids)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)

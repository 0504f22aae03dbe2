"""Odd rows, a tokenizer, and a cache of its own for every test."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dpo.data.dialogue import Refusal

ODD_FILE = Path(__file__).with_name("hh_odd.jsonl")
ODD = [json.loads(line) for line in ODD_FILE.read_bytes().split(b"\n")[:-1]]
OF_MESSAGES = {
    Refusal.UNMARKED,
    Refusal.HAS_IMAGES,
    Refusal.HAS_TOOLS,
    Refusal.TOOL_MESSAGE,
    Refusal.SYSTEM_WITHOUT_TEMPLATE,
}  # no text has them

CORPUS = [row[side] for row in ODD for side in ("chosen", "rejected")]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """As GPT-2, GPT-NeoX and Qwen: no begin of sequence."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", chat_template=chat_template)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"

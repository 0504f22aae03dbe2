"""Prompts -> answers that a model writes.

Takes token ids, gives token ids and text, up to the end of the answer. Knows nothing of losses or files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria

from dpo.columns import HUMAN
from dpo.prompts import Sampling
from dpo.sharing import plain
from dpo.tokens import Encoder

WINDOW = 12  # tokens in which the next human turn is looked for; there are no more in its marker

# What a model's own generation config may say; an answer is to be a draw from the model as it is scored.
NEUTRAL = {"top_k": 0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_p": 0.0, "typical_p": 1.0}


@dataclass(frozen=True)
class Answer:
    """What was written.

    Attributes:
        tokens: With the end of sequence at its end, where it is complete.
        text: Without control tokens and the white space around it.
        complete: It ended by itself, not at the longest length.
    """

    tokens: list[int]
    text: str
    complete: bool


@torch.no_grad()
def write(
    model: PreTrainedModel, encoder: Encoder, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int
) -> list[list[Answer]]:
    """Answers to every prompt, the same for the same seed, models and prompts."""
    writer: Any = model  # its `generate` is declared for a private type
    width = max(map(len, prompts))
    pad = encoder.end_ids[0]
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, **NEUTRAL}
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        num_return_sequences=sampling.answers,
        eos_token_id=list(encoder.end_ids),
        pad_token_id=pad,
        **(drawn if sampling.temperature else {"do_sample": False}),
    )
    stop = [] if encoder.chat else [_NextTurn(encoder, width)]
    with (
        torch.compiler.set_stance("force_eager"),  # layers compiled for training would be so anew with every cache
        plain(model),
        torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        output = writer.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=stop)
    answers = [_ended(row, encoder) for row in output[:, width:].tolist()]
    return [answers[first : first + sampling.answers] for first in range(0, len(answers), sampling.answers)]


class _NextTurn(StoppingCriteria):
    """Stops where the model goes on as the human."""

    def __init__(self, encoder: Encoder, start: int) -> None:
        self.tokenizer, self.start = encoder.tokenizer, start

    def __call__(self, input_ids: Tensor, *_: object, **__: object) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :][:, -WINDOW:])
        return torch.tensor([HUMAN in text for text in texts], device=input_ids.device)


def _ended(ids: list[int], encoder: Encoder) -> Answer:
    """The answer up to its end: an end of sequence, or the next human turn, which counts as one."""
    end = next((i for i, token in enumerate(ids) if token in encoder.end_ids), None)
    body = ids[:end]
    text = _text(body, encoder)
    turn = -1 if encoder.chat else text.find(HUMAN)
    if turn >= 0:
        kept = next(n for n in range(len(body)) if len(_text(body[: n + 1], encoder)) > turn)
        return Answer([*body[:kept], encoder.end_ids[0]], text[:turn].strip(), True)
    return Answer(body if end is None else ids[: end + 1], text.strip(), end is not None)


def _text(ids: list[int], encoder: Encoder) -> str:
    return str(encoder.tokenizer.decode(ids, skip_special_tokens=True))

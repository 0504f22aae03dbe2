"""Prompts -> answers that a model writes.

Takes token ids, gives token ids and text, up to the end of the answer. Knows nothing of losses or files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, StoppingCriteria

from dpo.models.prompt_sharing import standard_attention

STOP_WINDOW_TOKENS = 12  # tokens in which the next human turn is looked for; there are no more in its marker

# What a model's own generation config may say; an answer is to be a draw from the model as it is scored.
NEUTRAL_SAMPLING = {"top_k": 0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_p": 0.0, "typical_p": 1.0}


def _check(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"--data.sampling.{name}: expected {expected}, got {value!r}.")


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        answers: To every prompt, from each model.
        temperature: The logits are divided by it; 0 takes the most probable token (one answer, then).
        top_p: Only the most probable tokens that together have this probability.
        max_new_tokens: Longest answer.
    """

    answers: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        """Check all.

        Raises:
            ValueError: One has no such value.
        """
        _check("answers", self.answers, self.answers >= 1, "at least 1 answer")
        _check("temperature", self.temperature, 0 <= self.temperature < float("inf"), "a number of 0 or more")
        drawn = self.temperature > 0 or self.answers == 1
        _check("temperature", self.temperature, drawn, "more than 0, or all answers would be the same")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "a probability above 0")
        _check("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1 token")


GREEDY_SAMPLING = Sampling(answers=1, temperature=0.0)


@runtime_checkable
class Speech(Protocol):
    """What is to be known of the text that a model writes.

    Attributes:
        tokenizer: Makes text of tokens.
        end_ids: Ids that end an answer, of which the first is the end of sequence.
        next_turn: The marker of the next human turn, where answers also end at one.
    """

    tokenizer: PreTrainedTokenizerFast
    end_ids: tuple[int, ...]
    next_turn: str | None


@dataclass(frozen=True)
class GeneratedAnswer:
    """What was written.

    Attributes:
        tokens: With the end of sequence at its end, where it is complete.
        text: Without control tokens and the white space around it.
        complete: It ended by itself, not at the longest length.
    """

    tokens: list[int]
    text: str
    is_complete: bool


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel, encoder: Speech, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int
) -> list[list[GeneratedAnswer]]:
    """Answers to every prompt, the same for the same seed, models and prompts."""
    writer: Any = model  # its `generate` is declared for a private type
    width = max(map(len, prompts))
    pad = encoder.end_ids[0]
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, **NEUTRAL_SAMPLING}
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        num_return_sequences=sampling.answers,
        eos_token_id=list(encoder.end_ids),
        pad_token_id=pad,
        **(drawn if sampling.temperature else {"do_sample": False}),
    )
    stop = [_NextTurn(encoder.tokenizer, encoder.next_turn, width)] if encoder.next_turn else []
    with (
        torch.compiler.set_stance("force_eager"),  # layers compiled for training would be so anew with every cache
        standard_attention(model),
        torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        output = writer.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=stop)
    answers = [_ended(row, encoder) for row in output[:, width:].tolist()]
    return [answers[first : first + sampling.answers] for first in range(0, len(answers), sampling.answers)]


class _NextTurn(StoppingCriteria):
    """Stops where the model goes on as the human."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, marker: str, start: int) -> None:
        self.tokenizer, self.marker, self.start = tokenizer, marker, start

    def __call__(self, input_ids: Tensor, *_: object, **__: object) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :][:, -STOP_WINDOW_TOKENS:])
        return torch.tensor([self.marker in text for text in texts], device=input_ids.device)


def _ended(ids: list[int], encoder: Speech) -> GeneratedAnswer:
    """The answer up to its end: an end of sequence, or the next human turn, which counts as one."""
    end = next((i for i, token in enumerate(ids) if token in encoder.end_ids), None)
    body = ids[:end]
    text = _text(body, encoder)
    turn = text.find(encoder.next_turn) if encoder.next_turn else -1
    if turn >= 0:
        kept = next(n for n in range(len(body)) if len(_text(body[: n + 1], encoder)) > turn)
        return GeneratedAnswer([*body[:kept], encoder.end_ids[0]], text[:turn].strip(), True)
    return GeneratedAnswer(body if end is None else ids[: end + 1], text.strip(), end is not None)


def _text(ids: list[int], encoder: Speech) -> str:
    return str(encoder.tokenizer.decode(ids, skip_special_tokens=True))

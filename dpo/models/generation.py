"""Generate answers to prompts with a causal language model.

Answers are drawn from the model as it is scored: whatever its own generation config says about sampling is ignored.
Each one is cut at its end, which is an end-of-sequence token or the beginning of the next human turn.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, StoppingCriteria

from dpo.models.prompt_sharing import standard_attention

STOP_WINDOW_TOKENS = 12  # newest tokens that are searched for the next human turn; its marker has no more

# Turns off what a model's own generation config may set.
NEUTRAL_SAMPLING = {"top_k": 0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_p": 0.0, "typical_p": 1.0}


def _check(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"--data.sampling.{name}: expected {expected}, got {value!r}.")


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        answers: Number of answers to every prompt, from each model.
        temperature: Divisor of the logits; 0 always takes the most probable token, and then gives one answer only.
        top_p: Draw only from the most probable tokens that together have this probability.
        max_new_tokens: Maximum length of an answer, in tokens.
    """

    answers: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: One is outside its range.
        """
        _check("answers", self.answers, self.answers >= 1, "at least 1 answer")
        _check("temperature", self.temperature, 0 <= self.temperature < float("inf"), "a number of 0 or more")
        varied = self.temperature > 0 or self.answers == 1
        _check("temperature", self.temperature, varied, "more than 0, or all answers would be the same")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "a probability above 0")
        _check("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1 token")


GREEDY_SAMPLING = Sampling(answers=1, temperature=0.0)


@runtime_checkable
class Speech(Protocol):
    """What `generate_answers` needs to know about the text that a model writes.

    Attributes:
        tokenizer: Tokenizer of the model.
        end_ids: Ids that end an answer; the first one is the end of sequence.
        next_turn: The marker of the next human turn if it ends an answer too, otherwise None.
        keeps_white_space: Whether white space around an answer is part of it.
    """

    tokenizer: PreTrainedTokenizerFast
    end_ids: tuple[int, ...]
    next_turn: str | None
    keeps_white_space: bool


@dataclass(frozen=True)
class GeneratedAnswer:
    """An answer that a model wrote.

    Attributes:
        tokens: Token ids; those of a complete answer end with an end of sequence.
        text: The text without control tokens, and without surrounding white space unless that is part of it.
        is_complete: Whether the model ended the answer, rather than the limit of its length.
    """

    tokens: list[int]
    text: str
    is_complete: bool


def derive_seed(*parts: object) -> int:
    """Return a seed of 64 bits that depends on all parts in all its bits; CPU generators use only the lowest 32."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel, encoder: Speech, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int
) -> list[list[GeneratedAnswer]]:
    """Generate answers to every prompt; they repeat for the same seed, model and prompts.

    Args:
        model: The model that answers.
        encoder: Its tokenizer, and what ends an answer.
        prompts: Token ids of every prompt.
        sampling: How answers are drawn.
        seed: Seed of the draws; torch's global generators are left as they were.

    Returns:
        For every prompt, `sampling.answers` answers.
    """
    if not prompts:
        return []
    generator: Any = model  # its `generate` is annotated with a private type
    width = max(map(len, prompts))
    pad = encoder.end_ids[0]
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    random = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, **NEUTRAL_SAMPLING}
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        num_return_sequences=sampling.answers,
        eos_token_id=list(encoder.end_ids),
        pad_token_id=pad,
        **(random if sampling.temperature else {"do_sample": False}),
    )
    stop = [_NextTurn(encoder.tokenizer, encoder.next_turn, width)] if encoder.next_turn else []
    with (
        torch.compiler.set_stance("force_eager"),  # every cache length would compile the layers again
        standard_attention(model),
        torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        output = generator.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=stop)
    answers = [_trim_answer(row, encoder) for row in output[:, width:].tolist()]
    return [answers[i : i + sampling.answers] for i in range(0, len(answers), sampling.answers)]


class _NextTurn(StoppingCriteria):
    """Stops an answer once the marker of the next human turn is in it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, marker: str, start: int) -> None:
        self.tokenizer = tokenizer
        self.marker = marker
        self.start = start

    def __call__(self, input_ids: Tensor, *_: object, **__: object) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :][:, -STOP_WINDOW_TOKENS:])
        return torch.tensor([self.marker in text for text in texts], device=input_ids.device)


def _trim_answer(ids: list[int], encoder: Speech) -> GeneratedAnswer:
    """Return the answer up to an end of sequence, or up to the next human turn, which is replaced by one."""
    end = next((i for i, token in enumerate(ids) if token in encoder.end_ids), None)
    body = ids[:end]
    text = _text(body, encoder)
    turn = text.find(encoder.next_turn) if encoder.next_turn else -1
    if turn >= 0:
        length = next(n for n in range(len(body)) if len(_text(body[: n + 1], encoder)) > turn)
        return GeneratedAnswer([*body[:length], encoder.end_ids[0]], text[:turn].strip(), True)
    text = text if encoder.keeps_white_space else text.strip()
    return GeneratedAnswer(body if end is None else ids[: end + 1], text, end is not None)


def _text(ids: list[int], encoder: Speech) -> str:
    return str(encoder.tokenizer.decode(ids, skip_special_tokens=True))

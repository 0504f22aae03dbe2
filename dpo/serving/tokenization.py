"""What the client wrote -> token ids, as in training; tokens -> text that may be shown.

Dialogues are read as rows of the data are (`Columns`) and become tokens through the `Encoder` that made the training
data. Knows no model.
"""

from collections.abc import Sequence
from typing import TypeVar

from tokenizers.decoders import DecodeStream

from dpo.data.columns import ASSISTANT_MARKER, HUMAN_MARKER, Columns
from dpo.data.dialogue import TURN_MARKERS, DialoguePair, Refusal, Turns
from dpo.data.prompts import PROBE_ANSWERS
from dpo.data.tokenization import PairEncoder, control_token_pattern
from dpo.models.batch import Example
from dpo.serving.schema import APIError, ChatMessage, PromptRequest

_T = TypeVar("_T")
REFUSAL_MESSAGES = {"system_without_template": "the model has learned no system messages: leave them out"}
NO_LENGTH_LIMIT = 2**40  # tokens: what is too long is refused here, never cut


class TextCodec:
    """Makes tokens for models that read `context` of them; the encoder is that of the training, but cuts nothing."""

    def __init__(self, encoder: PairEncoder, context: int) -> None:
        self.encoder, self.context, self.tokenizer = encoder, context, encoder.tokenizer
        self.control_pattern = control_token_pattern(encoder.tokenizer, encoder.end_ids, ())

    def encode_prompt(self, prompt: str | None, messages: Sequence[ChatMessage] | None) -> list[int]:
        """Ids up to where the answer begins."""
        return self._fitting(
            _used(self.encoder.encode(DialoguePair(_history(prompt, messages), *PROBE_ANSWERS))).prompt, answer=1
        )

    def encode_raw(self, prompt: str) -> list[int]:
        """Ids of a text as it is."""
        if self.control_pattern.search(prompt):
            raise APIError(400, "the text spells a control token of the model", "control_token_in_text", "prompt")
        return self._fitting(self.tokenizer(prompt, verbose=False)["input_ids"], answer=1)

    def encode_example(self, request: PromptRequest, *answers: str) -> Example:
        """One answer, or two that are tokenised together as in training."""
        chosen, *other = (f" {answer.lstrip(' ')}" for answer in answers)
        pair = DialoguePair(_history(request.prompt, request.messages), chosen, other[0] if other else f"{chosen}.")
        encoded = _used(self.encoder.encode(pair))
        ids = (encoded.chosen, encoded.rejected)[: len(answers)]
        return Example("request", self._fitting(encoded.prompt, max(map(len, ids))), ids)

    def _fitting(self, prompt: list[int], answer: int) -> list[int]:
        if not prompt or len(prompt) + answer > self.context:
            given = f"{len(prompt)} of the prompt and at least {answer} of the answer"
            raise APIError(400, f"expected 2 to {self.context} tokens, got {given}", "context_length_exceeded")
        return prompt

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds; empty where a character or the answer ends."""
        return StreamDecoder(self).decode_tokens(ids)


def _history(prompt: str | None, messages: Sequence[ChatMessage] | None) -> Turns:
    """What is to be answered: a question, hh-rlhf's text of a dialogue, or messages."""
    whole = prompt and prompt.startswith(HUMAN_MARKER) and prompt.endswith(ASSISTANT_MARKER)
    if prompt and any(mark in prompt for mark in TURN_MARKERS) and not whole:
        raise APIError(
            400, f"expected a dialogue from {HUMAN_MARKER!r} to {ASSISTANT_MARKER!r}", "bad_prompt", "prompt"
        )
    return _used(Columns().parse_history({"prompt": prompt or [message.model_dump() for message in messages or ()]}))


def _used(read: _T | Refusal) -> _T:
    if isinstance(read, Refusal):
        raise APIError(400, REFUSAL_MESSAGES.get(read, f"the dialogue cannot be used: {read.replace('_', ' ')}"), read)
    return read


class StreamDecoder:
    """Tokens -> text, holding back what could still become a stop string."""

    def __init__(
        self, codec: TextCodec, prompt: Sequence[int] = (), stops: Sequence[str] = (), skip_space: bool = False
    ) -> None:
        self.backend, self.stops, self.skip_space = codec.tokenizer.backend_tokenizer, stops, skip_space
        self.decode_stream = DecodeStream(skip_special_tokens=True)
        self.decode_tokens(prompt[-4:])  # so that the first token of the answer keeps its space
        self.held_text, self.is_stopped = "", False

    def decode_tokens(self, tokens: Sequence[int]) -> list[str]:
        """What each token adds."""
        return [self.decode_stream.step(self.backend, token) or "" for token in tokens]

    def release_text(self, words: Sequence[str], last: bool) -> str:
        """Text that may be shown after these words."""
        self.held_text += "".join(words)
        if self.skip_space and self.held_text:
            self.held_text, self.skip_space = self.held_text.removeprefix(" "), False
        found = [at for at in map(self.held_text.find, self.stops) if at >= 0]
        self.is_stopped = bool(found)
        keep = 0 if last else max((_overlap(self.held_text, stop) for stop in self.stops), default=0)
        end = min(found, default=len(self.held_text) - keep)
        shown, self.held_text = self.held_text[:end], self.held_text[end:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)

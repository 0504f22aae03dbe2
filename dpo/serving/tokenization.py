"""Conversion between the text of requests and token ids.

Dialogues are parsed like rows of the training data (`Columns`) and tokenized by the same `PairEncoder`, so that the
model sees here what it saw in training.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import TypeVar

from tokenizers.decoders import DecodeStream

from dpo.data.columns import ASSISTANT_MARKER, HUMAN_MARKER, Columns
from dpo.data.dialogue import TURN_MARKERS, DialoguePair, Refusal, Role, Turn, Turns
from dpo.data.prompts import PROBE_ANSWERS
from dpo.data.tokenization import PairEncoder, control_token_pattern
from dpo.models.batch import Example
from dpo.serving.schema import AnswersRequest, APIError, ChatMessage, RawPrompt, TokenizeRequest

_T = TypeVar("_T")
REFUSAL_MESSAGES = {"system_without_template": "this model was not trained with system messages: leave them out"}
NO_LENGTH_LIMIT = 2**40  # tokens; the server refuses what is too long, and truncates nothing


class TextCodec:
    """Converts text to tokens and back.

    Args:
        encoder: The encoder of the training data, but without a length limit.
        context: Maximum tokens of prompt and answer together.

    Attributes:
        vocabulary_size: Token ids below it are known.
        end_length: Tokens that follow the text of a complete answer: its end, and what a chat template puts before it.
    """

    def __init__(self, encoder: PairEncoder, context: int) -> None:
        self.encoder = encoder
        self.context = context
        self.tokenizer = encoder.tokenizer
        self.vocabulary_size = max(encoder.tokenizer.get_vocab().values()) + 1
        self.control_pattern = control_token_pattern(encoder.tokenizer, encoder.end_ids, ())
        probe = _accepted(encoder.encode(DialoguePair((Turn(Role.HUMAN, " Hello"),), " Yes", " No")))
        ends = zip(reversed(probe.chosen), reversed(probe.rejected), strict=False)
        self.end_length = len(list(takewhile(lambda pair: pair[0] == pair[1], ends)))

    def encode_prompt(
        self, prompt: str | None, messages: Sequence[ChatMessage] | None, answer_length: int = 1
    ) -> list[int]:
        """Return the token ids of a prompt, up to where the answer begins."""
        encoded = _accepted(self.encoder.encode(DialoguePair(self._history(prompt, messages), *PROBE_ANSWERS)))
        return self._fitting(encoded.prompt, answer_length)

    def encode_raw(self, prompt: RawPrompt, answer_length: int = 1) -> list[int]:
        """Return the token ids of a text as it is, without a dialogue format; ids stay as they are.

        Args:
            prompt: A text or token ids.
            answer_length: Tokens that must still fit into the context.
        """
        if isinstance(prompt, list):
            return self._fitting(self.known_ids(prompt, "prompt"), answer_length)
        if self.encoder.format == "plain":
            return self.encode_prompt(prompt, None, answer_length)
        if self.control_pattern.search(prompt):
            raise APIError(400, "the prompt contains a control token of the model", "control_token_in_text", "prompt")
        return self._fitting(self.tokenizer(prompt, verbose=False)["input_ids"], answer_length)

    def known_ids(self, ids: list[int], field: str) -> list[int]:
        """Return token ids from a client, which must be in the vocabulary: others would stop the batching thread."""
        if max(ids) >= self.vocabulary_size:
            message = f"{field}: expected token ids below {self.vocabulary_size}, got {max(ids)}"
            raise APIError(400, message, "token_id_out_of_range", field)
        return ids

    def tokenize(self, body: TokenizeRequest) -> list[int]:
        """Return the token ids of a text or of messages."""
        if body.prompt is None:
            return self.encode_prompt(None, body.messages)
        special = body.add_special_tokens is not False
        return list(self.tokenizer(body.prompt, add_special_tokens=special, verbose=False)["input_ids"])

    def encode_score(self, request: AnswersRequest) -> list[Example]:
        """Return every answer as an example of its own."""
        reasons = request.finish_reasons or ["stop"] * len(request.texts)
        return [self._encode(request, [text], [reason]) for text, reason in zip(request.texts, reasons, strict=True)]

    def encode_pair(self, request: AnswersRequest) -> Example:
        """Return two answers tokenized together, as in training."""
        return self._encode(request, request.texts, request.finish_reasons)

    def _encode(self, request: AnswersRequest, texts: Sequence[str], reasons: Sequence[str] | None) -> Example:
        chosen, *others = map(self.encoder.answer_text, texts)
        # The encoder takes pairs of different answers; what stands in for a missing one is dropped again below.
        rejected = others[0] if others else f"{chosen}."
        pair = DialoguePair(self._history(request.prompt, request.messages), chosen, rejected)
        encoded = _accepted(self.encoder.encode(pair))
        answers = zip((encoded.chosen, encoded.rejected), reasons or ["stop"] * len(texts), strict=False)
        ids = tuple(ids[: -self.end_length] or ids if reason == "length" else ids for ids, reason in answers)
        return Example("request", self._fitting(encoded.prompt, max(map(len, ids))), ids)

    def _history(self, prompt: str | None, messages: Sequence[ChatMessage] | None) -> Turns:
        if self.encoder.format != "plain":
            return _dialogue(prompt, messages)
        if messages and [message.role for message in messages] != ["user"]:
            text = "this model was trained on plain text, without roles: send one user message, or the text as prompt"
            raise APIError(400, text, "bad_prompt", "messages")
        return (Turn(Role.HUMAN, prompt or "".join(message.content for message in messages or ())),)

    def _fitting(self, prompt: list[int], answer_length: int) -> list[int]:
        if not prompt or len(prompt) + answer_length > self.context:
            got = f"{len(prompt)} in the prompt and at least {answer_length} in the answer"
            raise APIError(400, f"expected 2 to {self.context} tokens, got {got}", "context_length_exceeded")
        return prompt

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Return the text that each token adds: "" for a special token, and until a character is complete."""
        return StreamDecoder(self).decode_tokens(ids)


def _dialogue(prompt: str | None, messages: Sequence[ChatMessage] | None) -> Turns:
    """Return the turns to be answered, from a question, a dialogue in hh-rlhf's text format, or messages."""
    is_dialogue = prompt and prompt.startswith(HUMAN_MARKER) and prompt.endswith(ASSISTANT_MARKER)
    if prompt and any(marker in prompt for marker in TURN_MARKERS) and not is_dialogue:
        message = f"expected a dialogue that begins with {HUMAN_MARKER!r} and ends with {ASSISTANT_MARKER!r}"
        raise APIError(400, message, "bad_prompt", "prompt")
    said = [message.model_dump(include={"role", "content"}) for message in messages or ()]
    row = {"prompt": prompt or said}
    return _accepted(Columns().parse_history(row))


def _accepted(result: _T | Refusal) -> _T:
    if isinstance(result, Refusal):
        message = REFUSAL_MESSAGES.get(result, f"the dialogue cannot be used: {result.replace('_', ' ')}")
        raise APIError(400, message, result)
    return result


class StreamDecoder:
    """Decodes an answer token by token, and holds back text that may turn out to begin a stop string.

    Args:
        codec: Has the tokenizer.
        prompt: Token ids before the answer; without their context, the first token would lose its leading space.
        stops: Strings that end the answer and are not shown.
        skip_space: Drop one space at the start of the answer.

    Attributes:
        held_text: Decoded text that has not been released; once stopped, the stop string and what follows it.
        is_stopped: Whether a stop string has occurred.
    """

    def __init__(
        self, codec: TextCodec, prompt: Sequence[int] = (), stops: Sequence[str] = (), skip_space: bool = False
    ) -> None:
        self.backend = codec.tokenizer.backend_tokenizer
        self.stops = stops
        self.skip_space = skip_space
        self.decode_stream = DecodeStream(skip_special_tokens=True)
        self.decode_tokens(prompt[-4:])
        self.held_text = ""
        self.is_stopped = False

    def decode_tokens(self, tokens: Sequence[int]) -> list[str]:
        """Return the text that each token adds."""
        return [self.decode_stream.step(self.backend, token) or "" for token in tokens]

    def release_text(self, new_texts: Sequence[str], last: bool) -> str:
        """Add new text, and return as much as may be shown now: nothing of a stop string or what may begin one."""
        self.held_text += "".join(new_texts)
        if self.skip_space and self.held_text:
            self.held_text = self.held_text.removeprefix(" ")
            self.skip_space = False
        stop_positions = [position for position in map(self.held_text.find, self.stops) if position >= 0]
        self.is_stopped = bool(stop_positions)
        keep = 0 if last else max((_overlap(self.held_text, stop) for stop in self.stops), default=0)
        end = min(stop_positions, default=len(self.held_text) - keep)
        released = self.held_text[:end]
        self.held_text = self.held_text[end:]
        return released


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)

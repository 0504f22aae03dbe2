"""Messages -> token ids, as in training; tokens -> text that may be shown.

Takes what the client wrote; dialogues become tokens through the `Encoder` that made the training data. Knows no model.
"""

from collections.abc import Iterable, Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from dpo.batch import Example
from dpo.dialogue import Pair, Refusal, Role, Turn, parse
from dpo.serving.schema import Fault, Message
from dpo.tokens import Encoded, Encoder

HUMAN, ASSISTANT = f"\n\n{Role.HUMAN}:", f"\n\n{Role.ASSISTANT}:"
ROLES = {"user": Role.HUMAN, "assistant": Role.ASSISTANT}
PROBES = (" Yes.", " No.")  # two answers that show where the tokens of the prompt end
UNCUT = 2**40  # tokens: what is too long is refused here, never cut

History = tuple[Turn, ...]


class Text:
    """Makes tokens for one model.

    Args:
        encoder: As in training, but for `max_length`, which is `UNCUT`.
        context: Most tokens of prompt and answer.
    """

    def __init__(self, encoder: Encoder, context: int) -> None:
        self.encoder, self.context = encoder, context
        self.tokenizer: PreTrainedTokenizerFast = encoder.tokenizer
        special = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        self.control = special.union(self.tokenizer.all_special_tokens)

    def history(self, prompt: str | None, messages: Sequence[Message] | None) -> History:
        """The dialogue that is to be answered."""
        if messages is not None:
            return self._turns(messages)
        assert prompt is not None
        if HUMAN not in prompt and ASSISTANT not in prompt:
            return (Turn(Role.HUMAN, f" {prompt.strip()}"),)
        turns = parse(prompt)
        if isinstance(turns, Refusal) or turns[-1].text:
            reason = f": {turns}" if isinstance(turns, Refusal) else ""
            raise Fault(400, f"expected a dialogue from {HUMAN!r} to {ASSISTANT!r}{reason}", "bad_prompt", "prompt")
        return turns[:-1]

    def _turns(self, messages: Sequence[Message]) -> History:
        expected = ["user", "assistant"] * len(messages)
        if len(messages) % 2 == 0 or [m.role for m in messages] != expected[: len(messages)]:
            raise Fault(400, "expected user and assistant in turn, the user first and last", "bad_messages", "messages")
        if not self.encoder.chat and any(mark in m.content for m in messages for mark in (HUMAN, ASSISTANT)):
            raise Fault(400, f"{HUMAN!r} or {ASSISTANT!r} in a message is another turn", "bad_messages", "messages")
        return tuple(Turn(ROLES[m.role], f" {m.content.strip()}") for m in messages)

    def prompt(self, history: History) -> list[int]:
        """Ids up to where the answer begins."""
        return self._fits(self._encode(Pair(history, *PROBES)).prompt, answer=1)

    def raw(self, prompt: str) -> list[int]:
        """Ids of a text as it is."""
        if any(token in prompt for token in self.control):
            raise Fault(400, "the text spells a control token of the model", "control_token", "prompt")
        ids: list[int] = self.tokenizer(prompt, verbose=False)["input_ids"]
        return self._fits(ids, answer=1)

    def single(self, history: History, answer: str, name: str) -> Example:
        """One answer."""
        answer = _answer(answer)
        encoded = self._encode(Pair(history, answer, f"{answer}."))
        self._fits(encoded.prompt, len(encoded.chosen))
        return Example(name, encoded.prompt, (encoded.chosen,))

    def pair(self, history: History, chosen: str, rejected: str, name: str) -> Example:
        """Two answers, tokenised together as in training."""
        encoded = self._encode(Pair(history, _answer(chosen), _answer(rejected)))
        self._fits(encoded.prompt, max(len(encoded.chosen), len(encoded.rejected)))
        return Example(name, encoded.prompt, (encoded.chosen, encoded.rejected))

    def _encode(self, pair: Pair) -> Encoded:
        encoded = self.encoder.encode(pair)
        if isinstance(encoded, Refusal):
            raise Fault(400, f"the dialogue cannot be used: {encoded}", str(encoded))
        return encoded

    def _fits(self, prompt: list[int], answer: int) -> list[int]:
        if not prompt or len(prompt) + answer > self.context:
            given = f"{len(prompt)} of the prompt and at least {answer} of the answer"
            message = f"expected 2 to {self.context} tokens, got {given}"
            raise Fault(400, message, "context_length_exceeded")
        return prompt

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds; empty where a character or the answer ends."""
        stream = DecodeStream(skip_special_tokens=True)
        return [stream.step(self.tokenizer.backend_tokenizer, i) or "" for i in ids]


class Writer:
    """Tokens -> text, holding back what could still become a stop string."""

    def __init__(self, text: Text, prompt: Sequence[int], stops: Iterable[str], skip_space: bool) -> None:
        self.backend, self.stops, self.skip = text.tokenizer.backend_tokenizer, list(stops), skip_space
        self.stream = DecodeStream(skip_special_tokens=True)
        for token in prompt[-4:]:  # so that the first token of the answer keeps its space
            self.stream.step(self.backend, token)
        self.held, self.stopped = "", False

    def write(self, tokens: Sequence[int], last: bool) -> tuple[str, list[str]]:
        """Text that may be shown after these tokens, and what each token added."""
        pieces = [self.stream.step(self.backend, token) or "" for token in tokens]
        self.held += "".join(pieces)
        if self.skip and self.held:
            self.held, self.skip = self.held.removeprefix(" "), False
        found = [at for at in (self.held.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.stopped = True
            return self.held[: min(found)], pieces
        keep = 0 if last else max((_overlap(self.held, stop) for stop in self.stops), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown, pieces


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


def _answer(text: str) -> str:
    return " " + text.lstrip(" ")

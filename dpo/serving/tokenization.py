"""What the client wrote -> token ids, as in training; tokens -> text that may be shown.

Dialogues are read as rows of the data are (`Columns`) and become tokens through the `Encoder` that made the training
data. Knows no model.
"""

from collections.abc import Sequence
from typing import TypeVar

from tokenizers.decoders import DecodeStream

from dpo.data.columns import ASSISTANT, HUMAN, Columns
from dpo.data.dialogue import MARKERS, Pair, Refusal, Turns
from dpo.data.prompts import PROBES
from dpo.data.tokenization import Encoder, control_tokens
from dpo.models.batch import Example
from dpo.serving.schema import Fault, Message, Question

T = TypeVar("T")
SAID = {"system_without_template": "the model has learned no system messages: leave them out"}
UNCUT = 2**40  # tokens: what is too long is refused here, never cut


class Text:
    """Makes tokens for models that read `context` of them; the encoder is that of the training, but cuts nothing."""

    def __init__(self, encoder: Encoder, context: int) -> None:
        self.encoder, self.context, self.tokenizer = encoder, context, encoder.tokenizer
        self.control = control_tokens(encoder.tokenizer, encoder.end_ids, ())

    def prompt(self, prompt: str | None, messages: Sequence[Message] | None) -> list[int]:
        """Ids up to where the answer begins."""
        return self._fitting(_used(self.encoder.encode(Pair(_history(prompt, messages), *PROBES))).prompt, answer=1)

    def raw(self, prompt: str) -> list[int]:
        """Ids of a text as it is."""
        if self.control.search(prompt):
            raise Fault(400, "the text spells a control token of the model", "control_token_in_text", "prompt")
        return self._fitting(self.tokenizer(prompt, verbose=False)["input_ids"], answer=1)

    def example(self, question: Question, *answers: str) -> Example:
        """One answer, or two that are tokenised together as in training."""
        chosen, *other = (f" {answer.lstrip(' ')}" for answer in answers)
        pair = Pair(_history(question.prompt, question.messages), chosen, other[0] if other else f"{chosen}.")
        encoded = _used(self.encoder.encode(pair))
        ids = (encoded.chosen, encoded.rejected)[: len(answers)]
        return Example("request", self._fitting(encoded.prompt, max(map(len, ids))), ids)

    def _fitting(self, prompt: list[int], answer: int) -> list[int]:
        if not prompt or len(prompt) + answer > self.context:
            given = f"{len(prompt)} of the prompt and at least {answer} of the answer"
            raise Fault(400, f"expected 2 to {self.context} tokens, got {given}", "context_length_exceeded")
        return prompt

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds; empty where a character or the answer ends."""
        return Writer(self).words(ids)


def _history(prompt: str | None, messages: Sequence[Message] | None) -> Turns:
    """What is to be answered: a question, hh-rlhf's text of a dialogue, or messages."""
    whole = prompt and prompt.startswith(HUMAN) and prompt.endswith(ASSISTANT)
    if prompt and any(mark in prompt for mark in MARKERS) and not whole:
        raise Fault(400, f"expected a dialogue from {HUMAN!r} to {ASSISTANT!r}", "bad_prompt", "prompt")
    return _used(Columns().history({"prompt": prompt or [message.model_dump() for message in messages or ()]}))


def _used(read: T | Refusal) -> T:
    if isinstance(read, Refusal):
        raise Fault(400, SAID.get(read, f"the dialogue cannot be used: {read.replace('_', ' ')}"), read)
    return read


class Writer:
    """Tokens -> text, holding back what could still become a stop string."""

    def __init__(
        self, text: Text, prompt: Sequence[int] = (), stops: Sequence[str] = (), skip_space: bool = False
    ) -> None:
        self.backend, self.stops, self.skip = text.tokenizer.backend_tokenizer, stops, skip_space
        self.stream = DecodeStream(skip_special_tokens=True)
        self.words(prompt[-4:])  # so that the first token of the answer keeps its space
        self.held, self.stopped = "", False

    def words(self, tokens: Sequence[int]) -> list[str]:
        """What each token adds."""
        return [self.stream.step(self.backend, token) or "" for token in tokens]

    def write(self, words: Sequence[str], last: bool) -> str:
        """Text that may be shown after these words."""
        self.held += "".join(words)
        if self.skip and self.held:
            self.held, self.skip = self.held.removeprefix(" "), False
        found = [at for at in map(self.held.find, self.stops) if at >= 0]
        self.stopped = bool(found)
        keep = 0 if last else max((_overlap(self.held, stop) for stop in self.stops), default=0)
        end = min(found, default=len(self.held) - keep)
        shown, self.held = self.held[:end], self.held[end:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)

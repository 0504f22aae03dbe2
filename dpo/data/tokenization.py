"""Tokenization of preference pairs. Where a sequence begins, ends and is cut is decided here and nowhere else.

Each side of a pair, prompt and answer together, is tokenized as one text, as the model will see it. The prompt is the
longest run of leading tokens that both sides share and that ends at or before the last character of the prompt; a token
that reaches over that boundary belongs to the answer, on both sides.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpo.data.columns import chat_messages
from dpo.data.dialogue import TURN_MARKERS, DialoguePair, Refusal, Role, Turn, Turns
from dpo.models.chat_template import added_prefix

MIN_LENGTH = 8
"""Smallest allowed maximum length, in tokens of prompt and answer; shorter pairs say nothing about a preference."""

TextFormat = Literal["auto", "hh", "chat", "plain"]
_Texts = tuple[str, str, str]  # prompt, prompt + chosen, prompt + rejected
_Render = Callable[[Sequence[DialoguePair]], list[_Texts]]
_FORMAT_REASONS = {
    "chat": "chat, as the tokenizer has a chat template",
    "hh": 'hh, as the tokenizer has no chat template: a prompt without turns becomes "\\n\\nHuman: ... '
    '\\n\\nAssistant:" (--data.format plain takes text as it stands)',
}
_PROBE = DialoguePair((Turn(Role.HUMAN, " Hello"),), " Good day.", " Bye.")


@dataclass(frozen=True)
class EncodedPair:
    """A tokenized pair, and how truncation changed it.

    Attributes:
        prompt: Token ids that both answers share, at least one; with the begin-of-sequence token if the model has one.
        chosen: Token ids of the chosen answer, all of them scored. The last is the only end-of-sequence token, unless
            the answer was cut.
        rejected: Token ids of the rejected answer, likewise.
        turns_dropped: Number of oldest turns that were left out of the prompt, two per exchange.
        prompt_cut: Whether the start of the remaining prompt was cut.
        chosen_cut: Whether the end of the chosen answer was cut, and with it the end-of-sequence token.
        rejected_cut: Whether the end of the rejected answer was cut, likewise.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    turns_dropped: int = 0
    prompt_cut: bool = False
    chosen_cut: bool = False
    rejected_cut: bool = False

    @property
    def sequence_length(self) -> int:
        """Tokens of the prompt and the longer answer."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


class PairEncoder:
    """Tokenizes pairs for one model.

    Args:
        tokenizer: A fast tokenizer; only those know which token came from which character.
        max_length: Maximum tokens of prompt and answer. If a pair is longer, the oldest exchanges are dropped from the
            prompt first, then the start of what remains of it is cut (the begin-of-sequence token stays). An answer is
            cut only if it alone does not fit, and then it has no end-of-sequence token.
        format: ``hh`` tokenizes the text of the dialogue as it is, ``chat`` renders the dialogue, stripped of white
            space, with the tokenizer's chat template, ``plain`` tokenizes the only turn before the answer and the
            answer as they stand, control tokens too; ``auto`` is ``chat`` if there is a template and ``hh`` otherwise.
            System messages need a chat template that renders them; pairs with one are refused otherwise.
        end_ids: Further token ids that end an answer, as named by the model's generation config. If the chat template
            ends a turn with one of these, it is the end of the sequence; otherwise the tokenizer's own end-of-sequence
            token is appended.

    Attributes:
        end_ids: All token ids that end an answer; the first is appended where the text has none.
        uses_chat_template: Whether dialogues are rendered with the chat template.
        next_turn: Text that also ends a generated answer, because it begins the next human turn; None but for ``hh``.
        format: The format in use, ``hh``, ``chat`` or ``plain``.
        format_reason: The format and why it is in use, in words.
        keeps_white_space: Whether white space around an answer is part of it.

    Raises:
        ValueError: The tokenizer or an option cannot be used; the message says what to do.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 512,
        format: TextFormat = "auto",
        end_ids: Sequence[int] = (),
    ) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError(
                f"Expected a fast tokenizer, which can map tokens to characters, got {type(tokenizer)}: "
                "load it with AutoTokenizer, or put a tokenizer.json into the model's folder."
            )
        if max_length < MIN_LENGTH:
            raise ValueError(f"max_length (prompt + answer): expected >= {MIN_LENGTH} tokens, got {max_length}.")
        if format == "chat" and tokenizer.chat_template is None:
            raise ValueError("format 'chat' needs a chat template, and the tokenizer has none: use 'hh' or 'auto'.")
        ends = dict.fromkeys(i for i in (tokenizer.eos_token_id, *end_ids) if i is not None)
        if not ends:
            raise ValueError("The tokenizer has no end-of-sequence token, so no answer could end: set its eos_token.")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.end_ids = tuple(ends)
        chosen: TextFormat = "chat" if tokenizer.chat_template is not None else "hh"
        self.format_reason = _FORMAT_REASONS[chosen] if format == "auto" else f"{format}, as asked for"
        self.format: TextFormat = chosen if format == "auto" else format
        self.uses_chat_template = self.format == "chat"
        self.keeps_white_space = self.format == "plain"
        self.next_turn = TURN_MARKERS[0] if self.format == "hh" else None
        texts_by_format = {"chat": self._chat_texts, "hh": _dialogue_texts, "plain": _plain_texts}
        self._render: _Render = texts_by_format[self.format]
        prefix = added_prefix(tokenizer)
        self._prefix = [] if self.uses_chat_template else prefix  # a chat template writes its own
        self._kept_prefix = prefix or [i for i in (tokenizer.bos_token_id,) if i is not None]
        self._control = control_token_pattern(tokenizer, self.end_ids, TURN_MARKERS if self.format == "hh" else ())
        self._renders_system = self.uses_chat_template and self._template_renders_system()
        self.encode(_PROBE)  # so that a tokenizer that cannot work fails here and not at the first row

    @property
    def content_sha256(self) -> str:
        """SHA-256 of everything besides the text that decides the token ids."""
        tokenizer = self.tokenizer
        state = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map]
        state += [
            self.end_ids,
            self.max_length,
            self.uses_chat_template,
            *(["plain"] if self.keeps_white_space else []),
        ]
        content = json.dumps(state, sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()

    def encode(self, pair: DialoguePair) -> EncodedPair | Refusal:
        """Tokenize one pair, or return the reason why it cannot be used."""
        return self.encode_batch([pair])[0]

    def encode_batch(self, pairs: Sequence[DialoguePair]) -> list[EncodedPair | Refusal]:
        """Tokenize pairs together (the tokenizer uses all cores); return one result per pair, in order."""
        refusals = {i: self._refuse(pair) for i, pair in enumerate(pairs)}
        results: dict[int, EncodedPair | Refusal] = {i: reason for i, reason in refusals.items() if reason}
        waiting = {i: pair for i, pair in enumerate(pairs) if i not in results}
        while waiting:
            too_long = {}
            for (i, pair), whole in zip(waiting.items(), self._tokenize(list(waiting.values())), strict=True):
                if whole.sequence_length > self.max_length and pair.exchange_count:
                    too_long[i] = pair.without_oldest_exchange()
                else:
                    results[i] = self._truncate(whole, turns_dropped=len(pairs[i].history) - len(pair.history))
            waiting = too_long
        return [results[i] for i in range(len(pairs))]

    def _refuse(self, pair: DialoguePair) -> Refusal | None:
        if pair.system_turns and not self._renders_system:
            return Refusal.SYSTEM_WITHOUT_TEMPLATE
        if self.format == "plain":
            return Refusal.CONTROL_TOKEN_IN_TEXT if any(map(self._ends_early, (pair.chosen, pair.rejected))) else None
        texts = (pair.chosen, pair.rejected, *(turn.text for turn in pair.history))
        return Refusal.CONTROL_TOKEN_IN_TEXT if any(map(self._control.search, texts)) else None

    def _ends_early(self, answer: str) -> bool:
        """Return whether text comes after an end token: it would be cut off."""
        ends = self.tokenizer.convert_ids_to_tokens(list(self.end_ids))
        return any(answer.partition(end)[2].strip() for end in ends)

    def answer_text(self, text: str) -> str:
        """Return an answer that somebody gives as it follows its prompt: after a space, or as it stands."""
        return text if self.keeps_white_space else f" {text.lstrip(' ')}"

    def _template_renders_system(self) -> bool:
        """Return whether the chat template shows system messages; some raise an error at one, some drop it."""
        try:
            (text,) = self._apply_template([(Turn(Role.SYSTEM, "A rule."), *_PROBE.history)], ask=True)
        except ValueError:
            return False
        return "A rule." in text

    def _tokenize(self, pairs: Sequence[DialoguePair]) -> list[EncodedPair]:
        """Tokenize pairs without truncation."""
        texts = self._render(pairs)
        sides = [side for _, *both in texts for side in both]
        tokenized = self.tokenizer(sides, add_special_tokens=False, return_attention_mask=False, verbose=False)
        prompt_ends = [
            _tokens_before(range(len(prompt), len(side)), tokenized.encodings[2 * i + k])
            for i, (prompt, *both) in enumerate(texts)
            for k, side in enumerate(both)
        ]
        ids = tokenized["input_ids"]
        return [self._split(ids[k], ids[k + 1], min(prompt_ends[k], prompt_ends[k + 1])) for k in range(0, len(ids), 2)]

    def _split(self, chosen: list[int], rejected: list[int], boundary: int) -> EncodedPair:
        """Split both sides into prompt and answer where they differ first, or else after `boundary` tokens."""
        shared = next((i for i in range(boundary) if chosen[i] != rejected[i]), boundary)
        prefix = self._prefix if chosen[: len(self._prefix)] != self._prefix else []  # plain text may have its own
        if not prefix + chosen[:shared]:
            raise ValueError(
                "The tokenizer does not separate prompt and answers: use another tokenizer, or end a prompt of one "
                "word with a space or line end."
            )
        return EncodedPair(prefix + chosen[:shared], self._ended(chosen[shared:]), self._ended(rejected[shared:]))

    def _ended(self, answer: list[int]) -> list[int]:
        """Return the answer up to its first end token, which is appended if there is none."""
        end = next((i for i, token in enumerate(answer) if token in self.end_ids), None)
        return [*answer, self.end_ids[0]] if end is None else answer[: end + 1]

    def _truncate(self, whole: EncodedPair, turns_dropped: int) -> EncodedPair | Refusal:
        """Cut a pair to the maximum length when there is no exchange left to drop."""
        prefix = self._kept_prefix if whole.prompt[: len(self._kept_prefix)] == self._kept_prefix else []
        room = max(self.max_length - whole.sequence_length + len(whole.prompt), len(prefix), 1)
        excess = max(len(whole.prompt) - room, 0)
        prompt = prefix + whole.prompt[excess + len(prefix) :]
        chosen, rejected = (ids[: self.max_length - len(prompt)] for ids in (whole.chosen, whole.rejected))
        if chosen == rejected:
            return Refusal.IDENTICAL_AFTER_TRUNCATION
        cut = len(chosen) < len(whole.chosen), len(rejected) < len(whole.rejected)
        return EncodedPair(prompt, chosen, rejected, turns_dropped, excess > 0, *cut)

    def _chat_texts(self, pairs: Sequence[DialoguePair]) -> list[_Texts]:
        prompts = self._apply_template([pair.history for pair in pairs], ask=True)
        chosen = self._apply_template([(*pair.history, Turn(Role.ASSISTANT, pair.chosen)) for pair in pairs])
        rejected = self._apply_template([(*pair.history, Turn(Role.ASSISTANT, pair.rejected)) for pair in pairs])
        texts = list(zip(prompts, chosen, rejected, strict=True))
        for prompt, *sides in texts:
            if not all(side.startswith(prompt) for side in sides):
                raise ValueError(
                    f"The chat template ends a prompt with {prompt[-60:]!r} for generation, but not before a given "
                    "answer, so training would not see what generation sees: use format 'hh'."
                )
        return texts

    def _apply_template(self, dialogues: list[Turns], ask: bool = False) -> list[str]:
        messages = list(map(chat_messages, dialogues))
        try:
            texts: Any = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        except TemplateError as error:
            raise ValueError(f"The chat template cannot render a dialogue ({error}): use format 'hh'.") from error
        return list(texts)


def _dialogue_texts(pairs: Sequence[DialoguePair]) -> list[_Texts]:
    return [(pair.prompt_text, pair.prompt_text + pair.chosen, pair.prompt_text + pair.rejected) for pair in pairs]


def _plain_texts(pairs: Sequence[DialoguePair]) -> list[_Texts]:
    prompts = [pair.history[-1].text for pair in pairs]
    return [(text, text + pair.chosen, text + pair.rejected) for text, pair in zip(prompts, pairs, strict=True)]


def _tokens_before(answer: range, encoding: Encoding) -> int:
    """Return how many tokens come before the first that covers a character of the answer."""
    covering = map(encoding.char_to_token, answer)  # None for a character that the tokenizer skips
    return next((token for token in covering if token is not None), len(encoding))


def control_token_pattern(
    tokenizer: PreTrainedTokenizerFast, end_ids: Sequence[int], markers: Sequence[str]
) -> re.Pattern[str]:
    """Return a pattern of everything that no text may contain: control tokens, end tokens and `markers`."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    forbidden = added.union(tokenizer.all_special_tokens, tokenizer.convert_ids_to_tokens(list(end_ids)), markers)
    return re.compile("|".join(map(re.escape, sorted(forbidden))))

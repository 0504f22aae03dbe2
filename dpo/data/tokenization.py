"""`Pair` -> token ids. Where a sequence begins, ends and is cut is decided here and nowhere else.

Takes a Hugging Face fast tokenizer and pairs, gives the ids of the shared prompt and of both answers, or a
named refusal. Knows nothing of files, batches or models.

Each side is tokenised in one piece, prompt and answer together, as the model will see it. The prompt is the
longest run of leading tokens that both sides share and that ends at or before the prompt's last character; a
token that reaches over that boundary belongs to the answers, on both sides.
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

from dpo.data.dialogue import TURN_MARKERS, DialoguePair, Refusal, Role, Turn

MIN_LENGTH = 8
"""Tokens of prompt + answer below which a preference cannot be told."""

TextFormat = Literal["auto", "hh", "chat"]
_Texts = tuple[str, str, str]  # prompt, prompt + chosen, prompt + rejected
_Render = Callable[[Sequence[DialoguePair]], list[_Texts]]
_CHAT_ROLES = {Role.HUMAN: "user", Role.ASSISTANT: "assistant", Role.SYSTEM: "system"}
_PROBE = DialoguePair((Turn(Role.HUMAN, " Hello"),), " Good day.", " Bye.")


@dataclass(frozen=True)
class EncodedPair:
    """A tokenised pair and what truncation did to it.

    Attributes:
        prompt: Ids that both answers share, at least one; begin of sequence included where the model has one.
        chosen: Ids of the chosen answer, all scored: exactly one end of sequence, the last id, unless cut.
        rejected: The same of the rejected answer.
        turns_dropped: Oldest turns left out of the prompt, two an exchange.
        prompt_cut: The start of the remaining prompt is missing too.
        chosen_cut: The end of the chosen answer is missing, its end of sequence included.
        rejected_cut: The same of the rejected answer.
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
    """Tokenises pairs for one model.

    Args:
        tokenizer: A fast tokenizer (only those know which token came from which character).
        max_length: Most tokens of prompt + answer. Where a pair is longer, the oldest exchanges leave the
            prompt first, then the start of what remains of it (the begin of sequence stays); an answer is cut
            only where it alone does not fit, and then has no end of sequence.
        format: ``hh`` takes the dialogue's text as it is, ``chat`` renders it with the tokenizer's chat
            template (turns stripped of the white space around them), ``auto`` does so where there is one. Only a
            template has a place for a system message, and not every one: without, such a pair is refused.
        end_ids: Further ids that end an answer (the model's generation config names them). Where the chat
            template ends a turn with one, it is the end of sequence; otherwise the tokenizer's is appended.

    Raises:
        ValueError: The tokenizer or an option does not allow it; the message says what to do.
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
                f"Expected a fast tokenizer, which knows the characters of each token, got "
                f"{type(tokenizer)}: load it with AutoTokenizer, or put a tokenizer.json beside the model."
            )
        if max_length < MIN_LENGTH:
            raise ValueError(f"max_length (of prompt + answer): expected >= {MIN_LENGTH} tokens, got {max_length}.")
        if format == "chat" and tokenizer.chat_template is None:
            raise ValueError("format 'chat' needs a chat template, and the tokenizer has none: use 'hh' or 'auto'.")
        ends = dict.fromkeys(i for i in (tokenizer.eos_token_id, *end_ids) if i is not None)
        if not ends:
            raise ValueError("The tokenizer has no end of sequence, so that no answer could end: set its eos_token.")
        self.tokenizer, self.max_length, self.end_ids = tokenizer, max_length, tuple(ends)
        self.uses_chat_template = format != "hh" and tokenizer.chat_template is not None
        self.next_turn = None if self.uses_chat_template else TURN_MARKERS[0]  # what an answer also ends at
        self._render: _Render = self._chat_texts if self.uses_chat_template else _plain_texts
        added = _added_in_front(tokenizer)
        self._front = [] if self.uses_chat_template else added  # a chat template writes its own
        self._front_kept = added or [i for i in (tokenizer.bos_token_id,) if i is not None]
        self._control = control_token_pattern(tokenizer, self.end_ids, () if self.uses_chat_template else TURN_MARKERS)
        self._knows_system = self.uses_chat_template and self._renders_system()
        self.encode(_PROBE)  # what cannot work at all fails here and not at the first row

    @property
    def content_sha256(self) -> str:
        """SHA-256 of everything beside the text that the ids depend on."""
        tokenizer = self.tokenizer
        state = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map]
        content = json.dumps(
            [*state, self.end_ids, self.max_length, self.uses_chat_template], sort_keys=True, default=str
        )
        return hashlib.sha256(content.encode()).hexdigest()

    def encode(self, pair: DialoguePair) -> EncodedPair | Refusal:
        """Tokenise one pair."""
        return self.encode_batch([pair])[0]

    def encode_batch(self, pairs: Sequence[DialoguePair]) -> list[EncodedPair | Refusal]:
        """Tokenise pairs together (the tokenizer uses all cores): one result each, in order."""
        refused = {i: self._refused(pair) for i, pair in enumerate(pairs)}
        done: dict[int, EncodedPair | Refusal] = {i: reason for i, reason in refused.items() if reason}
        waiting = {i: pair for i, pair in enumerate(pairs) if i not in done}
        while waiting:
            too_long = {}
            for (i, pair), whole in zip(waiting.items(), self._tokenize(list(waiting.values())), strict=True):
                if whole.sequence_length > self.max_length and pair.exchange_count:
                    too_long[i] = pair.without_oldest_exchange()
                else:
                    done[i] = self._fit(whole, turns_dropped=len(pairs[i].history) - len(pair.history))
            waiting = too_long
        return [done[i] for i in range(len(pairs))]

    def _refused(self, pair: DialoguePair) -> Refusal | None:
        if pair.system_turns and not self._knows_system:
            return Refusal.SYSTEM_WITHOUT_TEMPLATE
        texts = (pair.chosen, pair.rejected, *(turn.text for turn in pair.history))
        return Refusal.CONTROL_TOKEN_IN_TEXT if any(map(self._control.search, texts)) else None

    def _renders_system(self) -> bool:
        """Whether the chat template shows a system message: some raise at one, some leave it out."""
        try:
            (text,) = self._apply_template([_messages((Turn(Role.SYSTEM, "A rule."), *_PROBE.history))], ask=True)
        except ValueError:
            return False
        return "A rule." in text

    def _tokenize(self, pairs: Sequence[DialoguePair]) -> list[EncodedPair]:
        """Ids of pairs at full length."""
        texts = self._render(pairs)
        sides = [side for _, *both in texts for side in both]
        coded = self.tokenizer(sides, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ends = [
            _tokens_before(range(len(prompt), len(side)), coded.encodings[2 * i + k])
            for i, (prompt, *both) in enumerate(texts)
            for k, side in enumerate(both)
        ]
        ids = coded["input_ids"]
        return [self._split(ids[k], ids[k + 1], min(ends[k], ends[k + 1])) for k in range(0, len(ids), 2)]

    def _split(self, chosen: list[int], rejected: list[int], boundary: int) -> EncodedPair:
        """Cut both sides where they part, at `boundary` tokens at the latest."""
        shared = next((i for i in range(boundary) if chosen[i] != rejected[i]), boundary)
        if not shared:
            raise ValueError("The tokenizer does not separate prompt and answers: use another tokenizer.")
        prompt = self._front + chosen[:shared]
        return EncodedPair(prompt, self._ended(chosen[shared:]), self._ended(rejected[shared:]))

    def _ended(self, answer: list[int]) -> list[int]:
        """The answer up to its end of sequence; where the text has none, with one."""
        end = next((i for i, token in enumerate(answer) if token in self.end_ids), None)
        return [*answer, self.end_ids[0]] if end is None else answer[: end + 1]

    def _fit(self, whole: EncodedPair, turns_dropped: int) -> EncodedPair | Refusal:
        """Cut what is too long with no exchange left to drop."""
        front = self._front_kept if whole.prompt[: len(self._front_kept)] == self._front_kept else []
        room = max(self.max_length - whole.sequence_length + len(whole.prompt), len(front), 1)
        excess = max(len(whole.prompt) - room, 0)
        prompt = front + whole.prompt[excess + len(front) :]
        chosen, rejected = (ids[: self.max_length - len(prompt)] for ids in (whole.chosen, whole.rejected))
        if chosen == rejected:
            return Refusal.IDENTICAL_AFTER_TRUNCATION
        cut = len(chosen) < len(whole.chosen), len(rejected) < len(whole.rejected)
        return EncodedPair(prompt, chosen, rejected, turns_dropped, excess > 0, *cut)

    def _chat_texts(self, pairs: Sequence[DialoguePair]) -> list[_Texts]:
        histories = [_messages(pair.history) for pair in pairs]
        chosen = [_messages((*pair.history, Turn(Role.ASSISTANT, pair.chosen))) for pair in pairs]
        rejected = [_messages((*pair.history, Turn(Role.ASSISTANT, pair.rejected))) for pair in pairs]
        prompts = self._apply_template(histories, ask=True)
        texts = list(zip(prompts, *map(self._apply_template, (chosen, rejected)), strict=True))
        for prompt, *sides in texts:
            if not all(side.startswith(prompt) for side in sides):
                raise ValueError(
                    f"The chat template ends a prompt with {prompt[-60:]!r}, not so where an answer follows; "
                    "training would not see what generation sees: use format 'hh'."
                )
        return texts

    def _apply_template(self, dialogues: list[list[dict[str, str]]], ask: bool = False) -> list[str]:
        try:
            texts: Any = self.tokenizer.apply_chat_template(dialogues, tokenize=False, add_generation_prompt=ask)
        except TemplateError as error:
            raise ValueError(f"The chat template refuses a dialogue ({error}): use format 'hh'.") from error
        return list(texts)


def _plain_texts(pairs: Sequence[DialoguePair]) -> list[_Texts]:
    return [(pair.prompt_text, pair.prompt_text + pair.chosen, pair.prompt_text + pair.rejected) for pair in pairs]


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": _CHAT_ROLES[turn.role], "content": turn.text.strip()} for turn in turns]


def _tokens_before(answer: range, encoding: Encoding) -> int:
    """How many tokens stand before the first that covers a character of the answer."""
    covering = map(encoding.char_to_token, answer)  # None where the tokenizer skips a character
    return next((token for token in covering if token is not None), len(encoding))


def _added_in_front(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """What the tokenizer itself puts before a text: a begin of sequence, as a rule, or nothing."""
    bare, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    return list(full[: next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)])


def control_token_pattern(
    tokenizer: PreTrainedTokenizerFast, end_ids: Sequence[int], markers: Sequence[str]
) -> re.Pattern[str]:
    """What no text may spell: control tokens, ends and these markers."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    spelled = added.union(tokenizer.all_special_tokens, tokenizer.convert_ids_to_tokens(list(end_ids)), markers)
    return re.compile("|".join(map(re.escape, sorted(spelled))))

"""`PairEncoder`: boundaries, truncation, chat templates and refusals."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpo.data.dialogue import DialoguePair, Refusal, Role, Turn, parse_pair
from dpo.data.tokenization import EncodedPair, PairEncoder, TextFormat
from tests.support.data import CHATML, ODD, byte_level

WHOLE = 10**6  # a maximum length that no pair reaches


def with_begin(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Like Llama's: puts a begin-of-sequence token before every text."""
    tokenizer = byte_level(chat_template)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    begin = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    return tokenizer


TOKENIZERS = {"byte_level": byte_level(), "with_begin": with_begin()}
tokenizers = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())


def pair_of(*said: str, chosen: str = " yes", rejected: str = " no") -> DialoguePair:
    roles = (Role.HUMAN, Role.ASSISTANT) * len(said)
    return DialoguePair(tuple(map(Turn, roles, said)), chosen, rejected)


def encoded(
    tokenizer: PreTrainedTokenizerBase, pair: DialoguePair, max_length: int = WHOLE, format: TextFormat = "auto"
) -> EncodedPair:
    found = PairEncoder(tokenizer, max_length, format).encode(pair)
    assert isinstance(found, EncodedPair)
    return found


@tokenizers
def test_prompt_and_answers_decode_to_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    for row in ODD:
        if row["expect"] not in {"kept", "identical_after_truncation"}:
            continue
        whole = encoded(tokenizer, parse_pair(row["chosen"], row["rejected"]))
        front = [] if tokenizer.bos_token is None else [tokenizer.bos_token_id]
        assert whole.prompt[: len(front)] == front
        for ids, text in ((whole.chosen, row["chosen"]), (whole.rejected, row["rejected"])):
            row_ids = whole.prompt + ids
            assert tokenizer.decode(row_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
            assert row_ids.count(tokenizer.eos_token_id) == 1 == row_ids[::-1].index(tokenizer.eos_token_id) + 1
            assert row_ids.count(tokenizer.bos_token_id) == len(front)


def test_a_token_over_the_boundary_belongs_to_both_answers() -> None:
    letters = {letter: i for i, letter in enumerate(sorted(set("\n\nHuman: hi Assistant: yesno!")))}
    vocabulary = letters | {": ": len(letters), ": y": len(letters) + 1, "</s>": len(letters) + 2}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", " "), (": ", "y")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")

    both = encoded(tokenizer, pair_of(" hi", chosen=" n!", rejected=" no"))  # ": " in both
    assert both.chosen == [vocabulary[": "], vocabulary["n"], vocabulary["!"], vocabulary["</s>"]]
    assert both.rejected == [vocabulary[": "], vocabulary["n"], vocabulary["o"], vocabulary["</s>"]]

    one = encoded(tokenizer, pair_of(" hi", chosen=" yes", rejected="no"))  # ": y" in one, ":" in the other
    assert one.prompt == both.prompt
    assert one.chosen[0] == vocabulary[": y"]
    assert one.rejected[0] == vocabulary[":"]


@tokenizers
@pytest.mark.parametrize("reason", [Refusal.CONTROL_TOKEN_IN_TEXT, Refusal.IDENTICAL_AFTER_TRUNCATION])
def test_refusals(tokenizer: PreTrainedTokenizerFast, reason: Refusal) -> None:
    row = next(row for row in ODD if row["expect"] == reason)
    assert PairEncoder(tokenizer, 32).encode(parse_pair(row["chosen"], row["rejected"])) is reason


def test_a_control_token_is_refused_wherever_it_stands() -> None:
    encoder = PairEncoder(TOKENIZERS["byte_level"])
    for said in ({"chosen": " <|im_end|>"}, {"rejected": " a</s>b"}):
        assert encoder.encode(pair_of(" hi", **said)) is Refusal.CONTROL_TOKEN_IN_TEXT
    assert encoder.encode(pair_of(" hi", " <|im_start|>", " go on")) is Refusal.CONTROL_TOKEN_IN_TEXT
    assert isinstance(encoder.encode(pair_of(" </S> <|im_end>")), EncodedPair)


text = st.lists(st.sampled_from([" meat", " cats", "é🐈", ".", "\n", " and then"]), max_size=12).map("".join)


@tokenizers
@given(
    exchanges=st.lists(st.tuples(text, text), max_size=3),
    last=st.tuples(text, text, text),
    max_length=st.integers(8, 90),
)
def test_truncation(
    tokenizer: PreTrainedTokenizerFast,
    exchanges: list[tuple[str, str]],
    last: tuple[str, str, str],
    max_length: int,
) -> None:
    question, chosen, rejected = last
    said = [text for exchange in exchanges for text in exchange]
    pair = pair_of(*said, question, chosen=" y" + chosen, rejected=" n" + rejected)
    short = encoded(tokenizer, pair, max_length)
    dropped = [replace(pair, history=pair.history[n:]) for n in range(0, len(pair.history), 2)]
    before = [encoded(tokenizer, shortened) for shortened in dropped]
    # Only as many exchanges are dropped as needed; the last human turn stays.
    fits = (n for n, candidate in enumerate(before) if candidate.sequence_length <= max_length)
    assert short.turns_dropped == 2 * next(fits, len(before) - 1)
    whole = before[short.turns_dropped // 2]
    front = [] if tokenizer.bos_token is None else [tokenizer.bos_token_id]
    # The end of the prompt is kept, after the begin-of-sequence token.
    kept = short.prompt[len(front) :]
    assert short.prompt[: len(front)] == front
    assert kept == whole.prompt[len(whole.prompt) - len(kept) :]
    assert short.prompt_cut == (len(short.prompt) < len(whole.prompt))
    # Answers are cut only if they do not fit with one prompt token, and then at their end.
    for ids, full, cut in (
        (short.chosen, whole.chosen, short.chosen_cut),
        (short.rejected, whole.rejected, short.rejected_cut),
    ):
        assert cut == (len(full) > max_length - 1)
        assert ids == (full[: max_length - 1] if cut else full)
        assert ids.count(tokenizer.eos_token_id) == (0 if cut else 1)
    assert len(short.prompt) >= 1
    assert short.sequence_length <= max_length
    # No room is wasted.
    assert not short.prompt_cut or short.sequence_length == max_length


@tokenizers
def test_a_batch_equals_its_pairs_encoded_one_by_one(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = [pair_of(*[" what do cats eat"] * n, rejected=" no" * n * n) for n in (1, 9, 3, 5, 1)]
    batch.insert(2, pair_of(" </s>"))
    encoder = PairEncoder(tokenizer, 48)
    assert encoder.encode_batch(batch) == [encoder.encode(pair) for pair in batch]
    assert encoder.encode_batch([]) == []


def test_chat_template_as_rendered() -> None:
    tokenizer = byte_level(CHATML)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat = PairEncoder(tokenizer, WHOLE, end_ids=[end])
    found = chat.encode(pair_of(" Hi. ", " Hello!", " And?\n", chosen=" Fine.", rejected=" Bad.\n"))
    assert isinstance(found, EncodedPair)
    assert chat.uses_chat_template
    assert tokenizer.decode(found.prompt) == (
        "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    )
    # The end of turn of the template is the end of the sequence; the line end after it is left out.
    assert tokenizer.decode(found.chosen) == "Fine.<|im_end|>"
    assert tokenizer.decode(found.rejected) == "Bad.<|im_end|>"
    # Unless it is one of the end ids, it is an ordinary token, and the tokenizer's own end is appended.
    assert tokenizer.decode(encoded(tokenizer, pair_of(" Hi.")).chosen) == "yes<|im_end|>\n</s>"


def test_the_begin_token_of_a_chat_template_survives_truncation() -> None:
    tokenizer = with_begin("{{ bos_token }}" + CHATML)
    dialogue = pair_of(*[" what do cats eat"] * 5)
    assert encoded(tokenizer, dialogue).prompt.count(tokenizer.bos_token_id) == 1
    for max_length in range(8, 80):
        short = encoded(tokenizer, dialogue, max_length)
        assert short.prompt[0] == tokenizer.bos_token_id
        assert short.sequence_length <= max_length
    without = with_begin(CHATML)
    assert without.bos_token_id not in encoded(without, dialogue).prompt


def test_format_chooses_between_text_and_template() -> None:
    templated, dialogue = byte_level(CHATML), pair_of(" Hi.")
    assert encoded(templated, dialogue, format="chat") == encoded(templated, dialogue)
    assert encoded(templated, dialogue, format="hh") == encoded(byte_level(), dialogue)


def test_unusable_tokenizers_raise_in_the_constructor() -> None:
    tokenizer = byte_level()
    with pytest.raises(ValueError, match=r"max_length .*>= 8 tokens, got 7"):
        PairEncoder(tokenizer, 7)
    with pytest.raises(ValueError, match="has none: use 'hh' or 'auto'"):
        PairEncoder(tokenizer, format="chat")
    with pytest.raises(ValueError, match="set its eos_token"):
        PairEncoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer))
    with pytest.raises(ValueError, match="Expected a fast tokenizer"):
        PairEncoder(PreTrainedTokenizerBase())
    with pytest.raises(ValueError, match=r"cannot render a dialogue .*no system.*use format 'hh'"):
        PairEncoder(byte_level("{{ raise_exception('no system') }}"))
    thinking = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    with pytest.raises(ValueError, match=r"ends a prompt with .*<think>.*use format 'hh'"):
        PairEncoder(byte_level(thinking))
    one_word = Tokenizer(models.WordLevel({"?": 0, "</s>": 1}, unk_token="?"))
    with pytest.raises(ValueError, match="does not separate prompt and answers"):
        PairEncoder(PreTrainedTokenizerFast(tokenizer_object=one_word, eos_token="</s>"))


def test_content_hash_covers_everything_that_changes_ids() -> None:
    def fingerprint(tokenizer: PreTrainedTokenizerFast, *options: object) -> str:
        return PairEncoder(tokenizer, *options).content_sha256

    same = fingerprint(byte_level()), fingerprint(byte_level(), 512, "hh")
    assert len(set(same)) == 1
    others = [
        fingerprint(with_begin()),
        fingerprint(byte_level(), 511),
        fingerprint(byte_level(), 512, "hh", [3]),
        fingerprint(byte_level(CHATML)),
        fingerprint(byte_level(CHATML.replace("<|im_end|>\n", "<|im_end|>"))),
    ]
    assert len({same[0], *others}) == 1 + len(others)


def test_truncation_and_padding_of_the_tokenizer_file_are_not_applied() -> None:
    tokenizer = byte_level()
    expected = encoded(tokenizer, pair_of(" what do cats eat"))
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert encoded(tokenizer, pair_of(" what do cats eat")) == expected


def test_ids_equal_those_of_trl_on_real_rows(hh_rlhf: Path, pretrained: Path) -> None:
    """In TRL 1.16 the prompt ends where the tokens of prompt, prompt + chosen and prompt + rejected differ."""
    prefix = pytest.importorskip("trl.data_utils").common_prefix_length
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    tokenizer.model_max_length = WHOLE  # or it warns about every longer text
    encoder, end = PairEncoder(tokenizer, WHOLE), tokenizer.eos_token
    found = 0
    for file in sorted(hh_rlhf.glob("*/test.jsonl.gz")):
        for row in map(json.loads, gzip.decompress(file.read_bytes()).split(b"\n")[:-1]):
            parsed = parse_pair(row["chosen"], row["rejected"])
            if isinstance(parsed, Refusal):
                continue
            texts = (parsed.prompt_text, row["chosen"] + end, row["rejected"] + end)
            prompt, chosen, rejected = (tokenizer(text)["input_ids"] for text in texts)
            shared = min(prefix(prompt, chosen), prefix(prompt, rejected))
            assert encoder.encode(parsed) == EncodedPair(prompt[:shared], chosen[shared:], rejected[shared:])
            found += 1
    assert found > 0


SYSTEM_PAIR = DialoguePair((Turn(Role.SYSTEM, " Be brief."), Turn(Role.HUMAN, " Hello")), " Good day.", " Bye.")
DEAF = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)


def test_a_system_message_is_kept_if_the_template_renders_it() -> None:
    tokenizer = byte_level(CHATML)
    encoded = PairEncoder(tokenizer).encode(SYSTEM_PAIR)
    assert isinstance(encoded, EncodedPair)
    assert "Be brief." in tokenizer.decode(encoded.prompt)
    long = DialoguePair(
        (*SYSTEM_PAIR.history, Turn(Role.ASSISTANT, " Oh " * 60), Turn(Role.HUMAN, " So?")), " Yes", " No"
    )
    short = PairEncoder(tokenizer, 100).encode(long)
    assert isinstance(short, EncodedPair)
    assert short.turns_dropped == 2
    assert "Be brief." in tokenizer.decode(short.prompt)


@pytest.mark.parametrize("template", [None, DEAF, STRICT])
def test_a_system_message_is_refused_if_it_would_be_lost(template: str | None) -> None:
    assert PairEncoder(byte_level(template)).encode(SYSTEM_PAIR) == Refusal.SYSTEM_WITHOUT_TEMPLATE


def test_a_turn_marker_in_the_text_is_refused_without_a_template() -> None:
    pair = DialoguePair((Turn(Role.HUMAN, " Hello"),), " Good day.\n\nHuman: No.", " Bye.")
    assert PairEncoder(byte_level()).encode(pair) == Refusal.CONTROL_TOKEN_IN_TEXT
    assert isinstance(PairEncoder(byte_level(CHATML)).encode(pair), EncodedPair)

"""The format ``plain``: text as it stands, in training, generation, rewards and on the server."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo.data.columns import Columns
from dpo.data.dialogue import DialoguePair, Refusal, Role, Turn
from dpo.data.formats import BadLineError
from dpo.data.plain import history_parser, row_parser
from dpo.data.prompts import encode_answers, encode_prompt
from dpo.data.tokenization import EncodedPair, PairEncoder
from dpo.runs.folder import Run
from dpo.serving.schema import APIError, ChatMessage, ScoreRequest
from dpo.serving.tokenization import NO_LENGTH_LIMIT, TextCodec
from dpo.training.dpo import DPO
from dpo.training.predict import label_best_and_worst
from tests.support.data import CHATML, byte_level
from tests.support.runs import Lab

PLAIN = PairEncoder(byte_level(CHATML), format="plain")
parse = row_parser(Columns(), "plain")


def decoded(encoder: PairEncoder, ids: list[int]) -> str:
    return str(encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def text_pair(prompt: str, chosen: str, rejected: str) -> DialoguePair | Refusal:
    return parse({"prompt": prompt, "chosen": chosen, "rejected": rejected}).pair


@pytest.mark.parametrize("prompt", ["Q: 1 + 1?\nA:", " a \n\n", "\n\nHuman: x\n\nAssistant:", "<|im_start|>user\nHi"])
def test_text_becomes_tokens_as_it_stands(prompt: str) -> None:
    pair = text_pair(prompt, " two\n", "\tno ")
    assert isinstance(pair, DialoguePair)
    encoded = PLAIN.encode(pair)
    assert isinstance(encoded, EncodedPair)
    assert decoded(PLAIN, encoded.prompt + encoded.chosen) == f"{prompt} two\n</s>"
    assert decoded(PLAIN, encoded.prompt + encoded.rejected) == f"{prompt}\tno </s>"


def test_a_prompt_without_a_column_is_what_both_answers_begin_with() -> None:
    pair = parse({"chosen": "The sky is blue.", "rejected": "The sky is green."}).pair
    assert pair == DialoguePair((Turn(Role.HUMAN, "The sky is"),), " blue.", " green.")
    assert parse({"chosen": "yes", "rejected": "no"}).pair is Refusal.NO_HUMAN_START
    assert text_pair("", "a", "b") is Refusal.NO_HUMAN_START
    assert text_pair("a", " ", "b") is Refusal.EMPTY_ANSWER
    assert text_pair("a", "b", "b") is Refusal.IDENTICAL_ANSWERS


def test_messages_are_refused_with_a_reason() -> None:
    with pytest.raises(BadLineError) as error:
        parse({"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"})
    assert "column 'prompt': expected text, as --data.format plain takes text as it stands, got messages" in (
        error.value.detail
    )
    with pytest.raises(BadLineError):
        history_parser(Columns(), "plain")({"prompt": [{"role": "user", "content": "a"}]})


def test_an_end_token_within_an_answer_and_a_system_message_are_refused() -> None:
    middle, end = text_pair("a", " b</s> c", " d"), text_pair("a", " b</s>", " d")
    assert isinstance(middle, DialoguePair)
    assert isinstance(end, DialoguePair)
    assert PLAIN.encode(middle) is Refusal.CONTROL_TOKEN_IN_TEXT
    encoded = PLAIN.encode(end)
    assert isinstance(encoded, EncodedPair)
    assert encoded.chosen.count(PLAIN.end_ids[0]) == 1
    system = parse({"prompt": "a", "chosen": "b", "rejected": "c", "system": "Be brief."}).pair
    assert isinstance(system, DialoguePair)
    assert PLAIN.encode(system) is Refusal.SYSTEM_WITHOUT_TEMPLATE


def test_prompts_and_answers_of_generate_and_rewards_are_as_they_stand() -> None:
    prompt = "\n\nHuman: a\n\nAssistant:"
    assert decoded(PLAIN, encode_prompt(PLAIN, prompt)) == prompt
    ((ids, answer),) = encode_answers(PLAIN, "1 +", ["1 = 2"])
    assert decoded(PLAIN, ids + answer) == "1 +1 = 2</s>"
    assert PLAIN.next_turn is None


def test_the_server_takes_text_as_it_stands() -> None:
    encoder = PairEncoder(byte_level(CHATML), NO_LENGTH_LIMIT, "plain")
    codec = TextCodec(encoder, 100)
    rendered = "<|im_start|>user\nHi<|im_end|>\n"
    expected = encoder.tokenizer(rendered)["input_ids"]
    assert codec.encode_prompt(None, [ChatMessage(role="user", content=rendered)]) == expected
    assert codec.encode_raw(rendered) == expected
    (example,) = codec.encode_score(ScoreRequest(prompt="1 +", answers=["1"]))
    assert decoded(encoder, [*example.prompt, *example.answers[0]]) == "1 +1</s>"
    with pytest.raises(APIError, match="trained on plain text"):
        codec.encode_prompt(None, [ChatMessage(role="system", content="a"), ChatMessage(role="user", content="b")])


def test_a_scorer_gets_the_prompt_as_it_stands() -> None:
    seen = []

    def scorer(prompt: str, answers: list[str]) -> list[float]:
        seen.append(prompt)
        return [float(len(answer)) for answer in answers]

    answers = [{"text": text, "complete": True} for text in (" a", " bcd")]
    row = label_best_and_worst(
        {"id": "a:1", "prompt": "1 +", "chosen": None, "rejected": None, "answers": answers}, scorer
    )
    assert (seen, row["chosen"], row["rejected"]) == (["1 +"], " bcd", " a")


def test_the_format_goes_from_training_to_export_and_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": f"{i} +", "chosen": " 1", "rejected": " no"} for i in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--data=PreferencePairs", f"--data.path={file}", "--data.format=plain", "--data.val_fraction=0"]
    run: Run = Lab(tmp_path / "runs").fit("plain", *words, "--trainer.max_steps=1")
    assert json.loads((run.folder / "export" / "origin.json").read_text())["format"] == "plain"
    exported = DPO(str(run.folder / "export"))
    exported.configure_model()
    loaded = DPO.load_from_checkpoint(run.checkpoint_folder / "last.ckpt")
    assert [exported.encoder.format, loaded.encoder.format] == ["plain", "plain"]
    assert exported.generate(["1 +"], max_new_tokens=3) == loaded.generate(["1 +"], max_new_tokens=3)

"""Generated rows, the shipped tokenizer and policy, and the shipped run."""

import gzip
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo import quickstart
from dpo.models.origin import find_policy
from dpo.quickstart.generator import SUBSET_NAME, draw_rows, is_held_out, write_dataset
from dpo.quickstart.topics import TOPICS

MARK = "\n\nAssistant:"
DIALOGUE = re.compile(r"(\n\nHuman: [^\n]+\n\nAssistant: [^\n]+){1,3}")


def opening(text):
    return text.removeprefix("\n\nHuman: ").split(MARK)[0]


def split(text):
    end = text.rindex(MARK) + len(MARK)
    return text[:end], text[end:]


@pytest.fixture(scope="module")
def pairs():
    return list(draw_rows(5, 4_000))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(quickstart.POLICY_FOLDER)


def test_same_seed_same_rows_and_more_rows_continue_fewer(pairs):
    assert list(draw_rows(5, 100)) == pairs[:100]
    assert list(draw_rows(6, 100)) != pairs[:100]


def test_every_row_has_the_data_set_format(pairs):
    turns = set()
    for chosen, rejected in pairs:
        assert DIALOGUE.fullmatch(chosen) and DIALOGUE.fullmatch(rejected)
        assert chosen.isascii() and rejected.isascii() and "{" not in chosen + rejected
        (prompt, better), (same_prompt, worse) = split(chosen), split(rejected)
        assert prompt == same_prompt and better.strip() != worse.strip()
        turns.add(prompt.count("\n\nHuman:"))
    assert turns == {1, 2, 3}


def test_every_topic_opens_some_rows(pairs):
    openings = [opening(chosen) for chosen, _ in pairs]
    for topic in TOPICS:
        asked = {question.format(x=x) for question in topic.questions for x in topic.facts}
        assert any(question in text for text in openings for question in asked), topic.name


def test_the_longer_answer_wins_half_of_the_time(pairs, tokenizer):
    answers = [(split(chosen)[1], split(rejected)[1]) for chosen, rejected in pairs]
    characters = [len(chosen) - len(rejected) for chosen, rejected in answers]
    assert 0 not in characters
    assert 0.48 < sum(d > 0 for d in characters) / len(characters) < 0.52
    sides = [tokenizer(list(side)).input_ids for side in zip(*answers, strict=True)]
    tokens = [len(chosen) - len(rejected) for chosen, rejected in zip(*sides, strict=True)]
    untied = [d for d in tokens if d != 0]
    assert 0.48 < sum(d > 0 for d in untied) / len(untied) < 0.52


def test_train_and_test_share_no_opening_for_any_seeds(pairs):
    train = {opening(chosen) for chosen, _ in pairs}
    test = {opening(chosen) for chosen, _ in draw_rows(9, 500, held_out=True)}
    assert not any(map(is_held_out, train)) and all(map(is_held_out, test))
    assert len(train) > 0.75 * len(pairs)


def test_margins_are_a_third_column_of_the_same_rows(tmp_path):
    """The margin is 2 between a helpful and a rude answer, else 1."""
    for margins in (False, True):
        write_dataset(tmp_path / str(margins), 3, 400, 10, margins)
    plain, with_margins = (
        [
            json.loads(line)
            for line in gzip.decompress((tmp_path / name / SUBSET_NAME / "train.jsonl.gz").read_bytes()).splitlines()
        ]
        for name in ("False", "True")
    )
    assert [{**row, "margin": other["margin"]} for row, other in zip(plain, with_margins, strict=True)] == with_margins
    values = [row["margin"] for row in with_margins]
    assert set(values) == {1.0, 2.0}
    assert 0.02 < values.count(2.0) / len(values) < 0.09  # one in twenty


def test_two_runs_may_write_the_same_files(tmp_path, monkeypatch):
    """Another process writes the same files in the middle of this one; each has its own temporary file."""
    write_dataset(tmp_path, 3, 20, 10)
    wanted = (tmp_path / SUBSET_NAME / "train.jsonl.gz").read_bytes()
    replace = os.replace

    def other(partial, path):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            patch.setattr(os, "getpid", lambda: 1)
            write_dataset(tmp_path, 3, 20, 10)
        replace(partial, path)

    monkeypatch.setattr(os, "replace", other)
    write_dataset(tmp_path, 3, 20, 10)
    assert (tmp_path / SUBSET_NAME / "train.jsonl.gz").read_bytes() == wanted


def test_write_gives_the_rows_as_reproducible_files(tmp_path):
    assert write_dataset(tmp_path / "a", 3, 20, 10) == tmp_path / "a"
    write_dataset(tmp_path / "b", 3, 20, 10)
    for name, n, held_out in (("train", 20, False), ("test", 10, True)):
        file = Path(SUBSET_NAME) / f"{name}.jsonl.gz"
        raw = (tmp_path / "a" / file).read_bytes()
        assert raw == (tmp_path / "b" / file).read_bytes()
        read = [json.loads(line) for line in gzip.decompress(raw).splitlines()]
        assert [(row["chosen"], row["rejected"]) for row in read] == list(draw_rows(3, n, held_out))
        assert all(row.keys() == {"chosen", "rejected"} for row in read)
    assert sorted(path.name for path in (tmp_path / "a" / SUBSET_NAME).iterdir()) == [
        "test.jsonl.gz",
        "train.jsonl.gz",
    ]


def test_tokenizer_gives_the_text_back_with_offsets_and_one_bos(pairs, tokenizer):
    texts = [text for pair in pairs[:200] for text in pair] + [
        "naïve café, 東京 🙂\n\n\tHuman:  two  spaces ",
        "a 'm .",
    ]
    for text in texts:
        encoded = tokenizer(text, return_offsets_mapping=True)
        assert encoded.input_ids[0] == tokenizer.bos_token_id
        assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(encoded.input_ids[1:])
        assert tokenizer.decode(encoded.input_ids, skip_special_tokens=True) == text
        assert encoded.offset_mapping[0] == (0, 0)
        if text.isascii():  # several tokens share a character elsewhere
            assert "".join(text[start:end] for start, end in encoded.offset_mapping) == text


def test_tokenizer_knows_its_special_tokens(tokenizer):
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<s>", "</s>")
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert tokenizer.chat_template is None


def test_prompt_alone_is_a_prefix_of_prompt_and_answer(pairs, tokenizer):
    for chosen, _ in pairs[:200]:
        prompt = tokenizer(split(chosen)[0]).input_ids
        assert tokenizer(chosen).input_ids[: len(prompt)] == prompt


def test_the_shipped_folder_is_small_and_readable():
    files = list(quickstart.POLICY_FOLDER.iterdir())
    assert sum(file.stat().st_size for file in files) < 8e6
    names = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {file.name for file in files} == names
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in files)


def test_the_untrained_policy_has_the_shipped_tokenizer_and_shapes(tmp_path):
    random_state = torch.random.get_rng_state()
    quickstart.write_untrained_policy(tmp_path / "a")
    assert torch.equal(torch.random.get_rng_state(), random_state)
    quickstart.write_untrained_policy(tmp_path / "b")
    for name in ("tokenizer.json", "config.json", "generation_config.json"):
        untrained, shipped = (
            json.loads((folder / name).read_text()) for folder in (tmp_path / "a", quickstart.POLICY_FOLDER)
        )
        assert untrained | {"transformers_version": None} == shipped | {"transformers_version": None}
    untrained, again = (load_file(tmp_path / folder / "model.safetensors") for folder in "ab")
    shipped = load_file(quickstart.POLICY_FOLDER / "model.safetensors")
    assert untrained.keys() == again.keys() == shipped.keys()
    for name, weight in untrained.items():
        assert torch.equal(weight, again[name])
        assert weight.shape == shipped[name].shape and weight.dtype == shipped[name].dtype == torch.float32


def test_the_policy_answers_the_sample_prompts_and_ends(tokenizer):
    policy = AutoModelForCausalLM.from_pretrained(quickstart.POLICY_FOLDER).eval()
    for prompt in quickstart.SAMPLE_PROMPTS:
        assert prompt.endswith(MARK) and is_held_out(opening(prompt))
        ids = torch.tensor([tokenizer(prompt).input_ids])
        answer = policy.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False)[0, ids.shape[1] :]
        assert answer[-1] == tokenizer.eos_token_id
        assert re.fullmatch(r" [A-Z][^\n]+[.?!]", tokenizer.decode(answer[:-1]))


def test_the_shipped_run_names_no_path_of_the_machine_that_made_it():
    for file in quickstart.TRAINED_RUN.rglob("*"):
        if file.suffix not in ("", ".safetensors"):
            assert not re.search(r"/(home|root|tmp|usr|work)/", file.read_text()), file


def test_the_shipped_run_is_of_the_shipped_policy_and_prefers_what_it_learned_to(tokenizer):
    """With full logits, by transformers alone: the sign of beta * (log-ratio chosen - log-ratio rejected)."""
    served = find_policy(str(quickstart.TRAINED_RUN / "export"))
    assert served.reference_path == str(quickstart.POLICY_FOLDER) and served.has_reference
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(path).eval() for path in (served.policy_path, served.reference_path)
    )

    @torch.no_grad()
    def reward(prompt, answer):
        ids = torch.tensor([[*tokenizer(prompt + answer).input_ids, tokenizer.eos_token_id]])
        start = len(tokenizer(prompt).input_ids)
        logps = (model(ids).logits.log_softmax(-1)[0, :-1] for model in (policy, reference))
        lp, reference_lp = (values.gather(-1, ids[0, 1:, None])[start - 1 :].sum() for values in logps)
        return served.beta * (lp - reference_lp).item()

    rows = [json.loads(line) for line in (quickstart.TRAINED_RUN / "held_out.jsonl").read_text().splitlines()]
    margins = [reward(row["prompt"], row["chosen"]) - reward(row["prompt"], row["rejected"]) for row in rows]
    assert len(margins) >= 30
    assert sum(margin > 0 for margin in margins) / len(margins) >= 0.95
    assert sum(margins) / len(margins) > 4  # 6.5 over the whole validation split, says its table

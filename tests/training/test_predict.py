"""A round of sampling, marking and training: the rows that are written, scorers, and generated answers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo import quickstart
from dpo.data.columns import Columns
from dpo.data.dialogue import Refusal
from dpo.data.preferences import PreferencePairs
from dpo.data.prompts import EncodedPrompt, Prompts
from dpo.data.tokenization import PairEncoder
from dpo.models.batch import Example, collate
from dpo.models.generation import GREEDY_SAMPLING, GeneratedAnswer, Sampling, derive_seed, generate_answers
from dpo.models.prompt_sharing import share_if_exact
from dpo.models.scoring import score
from dpo.runs.folder import Run
from dpo.training.predict import label_best_and_worst, load_scorer
from tests.support.runs import Lab, metrics

PROMPTS = ["Which city is the capital of Japan?", "What is the best way to make tea?", "I am sad. What can I do?"]
SMALL = ["--data.sampling.answers=3", "--data.sampling.max_new_tokens=24", "--data.max_length=128"]


def by_length(prompt: str, answers: list[str]) -> list[float]:
    """Rate longer answers higher, and check that the prompt is a dialogue."""
    assert prompt.startswith("\n\nHuman: ") and prompt.endswith("\n\nAssistant:")
    return [len(answer) for answer in answers]


def ties(prompt: str, answers: list[str]) -> list[float]:
    return [1.0] * len(answers)


def one_too_few(prompt: str, answers: list[str]) -> list[float]:
    return [1.0] * (len(answers) - 1)


def broken(prompt: str, answers: list[str]) -> list[float]:
    raise RuntimeError("the reward model\nis not there")


def words(prompt: str, answers: list[str]) -> list[Any]:
    return ["1"] * len(answers)


def one_text(prompt: str, answers: list[str]) -> Any:
    return "1" * len(answers)


def not_numbers(prompt: str, answers: list[str]) -> list[float]:
    return [math.nan] * len(answers)


def one_number(prompt: str, answers: list[str]) -> Any:
    return 1.0


def as_tensor(prompt: str, answers: list[str]) -> Any:
    return torch.tensor([len(answer) for answer in answers])


NOT_A_FUNCTION = 3


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    called = [{"role": "user", "content": "Hi."}, {"role": "tool", "content": "1"}]
    rows = [{"prompt": text} for text in PROMPTS] + [{"prompt": called}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("runs"))


def predict(lab: Lab, prompts: Path, name: str, *more: str) -> int:
    data = ["--model.policy=quickstart", "--data=Prompts", f"--data.path={prompts}", "--data.batch_size=2", *SMALL]
    base = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", f"--name={name}"]
    return lab.only("predict", f"--trainer.default_root_dir={lab.folder}", *base, *data, *more)


@pytest.fixture(scope="module")
def sampled(lab: Lab, prompts: Path) -> Run:
    assert predict(lab, prompts, "sampled", "--scorer=tests.training.test_predict:by_length") == 0
    return Run(lab.folder / "sampled")


def rows_of(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.predictions_path.read_text(encoding="utf-8").splitlines()]


def read_back(path: Path) -> PreferencePairs:
    data = PreferencePairs(str(path), tokenizer="quickstart", max_length=128, val_fraction=0.0)
    data.prepare_data()
    data.setup("fit")
    return data


def test_every_prompt_is_answered_by_both_models(sampled: Run) -> None:
    rows = rows_of(sampled)
    assert [row["id"] for row in rows] == ["prompts:1", "prompts:2", "prompts:3"]
    for row, prompt in zip(rows, PROMPTS, strict=True):
        assert row["prompt"] == f"\n\nHuman: {prompt}\n\nAssistant:"
        assert [answer["from"] for answer in row["answers"]] == ["policy"] * 3 + ["reference"] * 3
        assert len({answer["text"] for answer in row["answers"]}) > 1
        for answer in row["answers"]:
            assert answer["logps"]["policy"] < 0
            assert answer["logps"]["policy"] == pytest.approx(answer["logps"]["reference"])  # equal before training
            assert answer["reward"] == pytest.approx(0, abs=1e-5)
        by_role = [{a["text"] for a in row["answers"] if a["from"] == role} for role in ("policy", "reference")]
        assert by_role[0] != by_role[1], "equal models draw with seeds of their own"


def test_the_same_seed_draws_the_same_answers(lab: Lab, prompts: Path, sampled: Run) -> None:
    assert predict(lab, prompts, "again") == 0
    for again, before in zip(rows_of(Run(lab.folder / "again")), rows_of(sampled), strict=True):
        assert [a["text"] for a in again["answers"]] == [a["text"] for a in before["answers"]]


def test_derived_seeds_differ_in_the_bits_that_a_generator_on_the_cpu_uses() -> None:
    seeds = [derive_seed(seed, role) for seed in (0, 1, 2**32, 2**40) for role in ("policy", "reference")]
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)
    assert len({torch.Generator().manual_seed(seed).get_state().numpy().tobytes() for seed in seeds}) == len(seeds)


def test_a_supervised_stage_answers_too(lab: Lab, prompts: Path, sampled: Run) -> None:
    """Its rows have no values of a reference and no reward."""
    assert predict(lab, prompts, "supervised", "--model=SFT", "--scorer=tests.training.test_predict:by_length") == 0
    for row, both in zip(rows_of(Run(lab.folder / "supervised")), rows_of(sampled), strict=True):
        drawn = [answer for answer in both["answers"] if answer["from"] == "policy"]
        assert row["chosen"] and [answer["text"] for answer in row["answers"]] == [answer["text"] for answer in drawn]
        for answer, wanted in zip(row["answers"], drawn, strict=True):
            assert answer["logps"]["policy"] == pytest.approx(wanted["logps"]["policy"])
            assert answer["logps"]["reference"] is answer["reward"] is None


def test_a_supervised_stage_scores_the_chosen_answers_of_pairs(lab: Lab) -> None:
    words = [
        "--model.policy=quickstart",
        "--data.path=quickstart",
        "--data.limit=6",
        "--trainer.enable_progress_bar=false",
    ]
    found = {}
    for stage in ("SFT", "DPO"):
        root = [f"--trainer.default_root_dir={lab.folder}", "--trainer.accelerator=cpu", f"--name=pairs-{stage}"]
        assert lab.only("predict", f"--model={stage}", *root, *words) == 0
        found[stage] = {row["id"]: row["logps"] for row in rows_of(Run(lab.folder / f"pairs-{stage}"))}
    assert {i: pytest.approx(logps[:1]) for i, logps in found["DPO"].items()} == found["SFT"]
    assert len(found["SFT"]) == 6


def test_log_probabilities_equal_those_of_the_scorer(sampled: Run) -> None:
    """The written answers are tokenized and scored again."""
    model = AutoModelForCausalLM.from_pretrained(quickstart.POLICY_FOLDER).eval()
    encoder = PairEncoder(AutoTokenizer.from_pretrained(quickstart.POLICY_FOLDER), 104)
    share_if_exact(model)
    data = Prompts("unused", tokenizer="quickstart", sampling=Sampling(3, max_new_tokens=24), max_length=128)
    row = rows_of(sampled)[0]
    history = Columns().parse_history(row)
    assert not isinstance(history, Refusal) and data.encoder.max_length == 104
    ids = encoder.tokenizer(row["prompt"], add_special_tokens=True)["input_ids"]
    for answer in row["answers"]:
        again = encoder.tokenizer(" " + answer["text"], add_special_tokens=False)["input_ids"]
        if len(again) + 1 != answer["tokens"] or not answer["complete"]:
            continue  # the model wrote it in other tokens than the tokenizer makes of it
        batch = collate([Example("a", ids, ([*again, encoder.end_ids[0]],))])
        found = score(model, batch).logps.sum().item()
        assert found == pytest.approx(answer["logps"]["policy"], rel=1e-4)
        break
    else:
        pytest.fail("no answer could be compared")


def test_the_best_and_the_worst_complete_answer_are_marked(sampled: Run) -> None:
    for row in rows_of(sampled):
        candidates = [answer for answer in row["answers"] if answer["complete"] and answer["text"]]
        assert [answer["score"] for answer in candidates] == [len(answer["text"]) for answer in candidates]
        assert len(row["chosen"]) == max(len(answer["text"]) for answer in candidates)
        assert len(row["rejected"]) == min(len(answer["text"]) for answer in candidates)


def test_a_round_of_sampling_marking_and_training(lab: Lab, sampled: Run) -> None:
    data = read_back(sampled.predictions_path)
    counts = data.audits_by_split["train"].counts_by_subset["total"]
    assert (counts.read, counts.kept) == (3, 3)
    example, row = data.pairs_by_split["train"][0], rows_of(sampled)[0]
    decode = data.tokenizer.decode
    assert decode(list(example.prompt), skip_special_tokens=True).strip() == row["prompt"].strip()
    for ids, side in zip(example.answers, ("chosen", "rejected"), strict=True):
        assert decode(list(ids), skip_special_tokens=True).strip() == row[side]
    words = [f"--data.path={sampled.predictions_path}", "--data.batch_size=3", "--data.val_fraction=0"]
    base = [f"--trainer.default_root_dir={lab.folder}", "--trainer.accelerator=cpu", "--trainer.max_epochs=6"]
    quick = ["--model.policy=quickstart", "--optimizer.lr=1e-4", "--trainer.enable_progress_bar=false"]
    logs = ["--trainer.log_every_n_steps=1", "--name=trained", "--data=PreferencePairs", "--data.max_length=128"]
    assert lab.only("fit", *logs, *base, *quick, *words) == 0
    losses = [row["train/loss"] for row in metrics(Run(lab.folder / "trained")) if "train/loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0]


def test_the_next_round_starts_from_the_trained_policy(lab: Lab, prompts: Path, sampled: Run) -> None:
    """Policy and reference differ now, and so do the rewards."""
    trained = lab.folder / "trained"
    if not trained.is_dir():
        pytest.skip("the round did not run")
    checkpoint = f"--ckpt_path={trained / 'checkpoints' / 'last.ckpt'}"
    assert predict(lab, prompts, "second", checkpoint) == 0
    answers = [answer for row in rows_of(Run(lab.folder / "second")) for answer in row["answers"]]
    for answer in answers:
        ratio = answer["logps"]["policy"] - answer["logps"]["reference"]
        assert answer["reward"] == pytest.approx(0.1 * ratio, abs=1e-4)
    assert any(abs(answer["reward"]) > 1e-3 for answer in answers)


def test_unmarked_rows_are_counted_when_they_are_read_back(
    lab: Lab, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal scores mark nothing; the rows are the same in Parquet as in JSON Lines."""
    assert predict(lab, prompts, "ties", "--scorer=tests.training.test_predict:ties", "--output=answers.parquet") == 1
    assert "0 of 3 prompts labelled; 3 prompts have no two answers with different scores" in capsys.readouterr().err
    assert [file.name for file in (lab.folder / "ties").iterdir()] == ["answers.parquet"]
    data = read_back(lab.folder / "ties" / "answers.parquet")
    counts = data.audits_by_split["train"].counts_by_subset["total"]
    assert (counts.read, counts.kept, counts.refused["unmarked"]) == (3, 0, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scorer=nowhere:at_all"], "--scorer: expected module:function,"),
        (["--scorer=tests.training.test_predict"], "--scorer: expected module:function,"),
        (["--scorer=tests.training.test_predict:NOT_A_FUNCTION"], "--scorer: expected a function"),
        (["--scorer=tests.training.test_predict:one_too_few"], "finite numbers, one per answer"),
        (["--scorer=tests.training.test_predict:broken"], "an error (test_predict.py, line "),
        (["--scorer=tests.training.test_predict:broken"], "RuntimeError: the reward model is not there\n"),
        (["--scorer=tests.training.test_predict:words"], "at the prompt prompts:1: expected"),
        (["--scorer=tests.training.test_predict:one_text"], "one per answer, got '1"),
        (["--scorer=tests.training.test_predict:not_numbers"], "one per answer, got [nan"),
        (["--scorer=tests.training.test_predict:one_number"], "one per answer, got 1.0.\n"),
        (["--output=answers.csv"], "--output: expected the name of a file that ends in .jsonl or .parquet"),
        (["--output=../a.jsonl"], "--output: expected the name of a file"),
        (["--data.sampling.temperature=0"], "more than 0, or all answers would be the same"),
        (["--data.sampling.top_p=2"], "--data.sampling.top_p: expected a probability"),
        (["--data.sampling.max_new_tokens=125"], "--data.max_length: expected sampling.max_new_tokens + at least 8"),
        (["--data.path=/nowhere.jsonl"], "no local file, folder or pattern '/nowhere.jsonl'"),
    ],
)
def test_wrong_options_are_refused_with_a_message(
    lab: Lab, prompts: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    try:
        code = predict(lab, prompts, "refused", *words)
    except SystemExit as end:
        code = end.code
    assert code in (1, 2)
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_prompts_cannot_be_trained_on(lab: Lab, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--trainer.default_root_dir={lab.folder}", "--model.policy=quickstart", "--data=Prompts"]
    assert lab.only("fit", *words, f"--data.path={prompts}", "--name=nothing") == 1
    assert "expected preference pairs, got --data Prompts" in capsys.readouterr().err


def test_a_scorer_is_refused_for_pairs() -> None:
    with pytest.raises(ValueError, match="expected --data Prompts, got pairs"):
        label_best_and_worst(
            {"id": "a", "logps": [0.0, 0.0], "rewards": [0.0, 0.0]},
            load_scorer("tests.training.test_predict:by_length"),
        )


def test_an_answer_that_was_cut_off_is_not_marked() -> None:
    answers = [{"text": text, "complete": complete} for text, complete in (("aaaa", False), ("a", True), ("aa", True))]
    row = {"id": "a", "prompt": "\n\nHuman: b\n\nAssistant:", "chosen": None, "rejected": None, "answers": answers}
    marked = label_best_and_worst(row, by_length)
    assert (marked["chosen"], marked["rejected"]) == ("aa", "a")
    assert [answer["score"] for answer in marked["answers"]] == [None, 1.0, 2.0]
    assert label_best_and_worst({**row, "answers": answers[:1]}, by_length)["chosen"] is None


def test_a_scorer_may_return_a_tensor() -> None:
    answers = [{"text": text, "complete": True} for text in ("aaaa", "a")]
    row = {"id": "a", "prompt": "b", "chosen": None, "rejected": None, "answers": answers}
    assert label_best_and_worst(row, as_tensor)["chosen"] == "aaaa"


@pytest.mark.parametrize("given_as_messages", [False, True])
@pytest.mark.parametrize("stored_as_messages", [False, True])
def test_a_scorer_gets_the_prompt_as_the_data_has_it(given_as_messages: bool, stored_as_messages: bool) -> None:
    """Whether or not the model has a chat template, which decides how the row has it."""
    text, messages = "\n\nHuman: b\n\nAssistant:", [{"role": "user", "content": "b"}]
    asked = []

    def scorer(prompt: Any, answers: list[str]) -> list[float]:
        asked.append(prompt)
        return [0.0, 1.0]

    answers = [{"text": "x", "complete": True}, {"text": "y", "complete": True}]
    row = {"id": "a", "prompt": messages if stored_as_messages else text, "chosen": None, "answers": answers}
    label_best_and_worst(row, scorer, given_as_messages)
    assert asked == [messages if given_as_messages else text]


def only_messages(prompt: Any, answers: list[str]) -> list[float]:
    assert prompt == [{"role": "user", "content": PROMPTS[0]}]
    return [len(answer) for answer in answers]


def test_message_data_reaches_the_scorer_as_messages(lab: Lab, tmp_path: Path) -> None:
    file = tmp_path / "messages.jsonl"
    file.write_text(json.dumps({"prompt": [{"role": "user", "content": PROMPTS[0]}]}) + "\n")
    assert predict(lab, file, "messages", "--scorer=tests.training.test_predict:only_messages") == 0
    assert rows_of(Run(lab.folder / "messages"))[0]["prompt"] == f"\n\nHuman: {PROMPTS[0]}\n\nAssistant:"


def test_a_round_without_a_complete_answer_fails_and_says_why(
    lab: Lab, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--data.sampling.max_new_tokens=1", "--scorer=tests.training.test_predict:by_length"]
    assert predict(lab, prompts, "short", *short) == 1
    expected = "0 of 3 prompts labelled; 18 of 18 answers were cut at 1 tokens: raise --data.sampling.max_new_tokens."
    assert expected in capsys.readouterr().err
    assert len(rows_of(Run(lab.folder / "short"))) == 3, "the answers are kept"


def test_the_counts_are_printed_without_a_scorer_too(lab: Lab, prompts: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert predict(lab, prompts, "unscored", "--data.sampling.max_new_tokens=1") == 0
    assert "0 of 3 prompts labelled; 18 of 18 answers were cut at 1 tokens" in caplog.text


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generator() -> tuple[Any, PairEncoder]:
    model = AutoModelForCausalLM.from_pretrained(quickstart.POLICY_FOLDER).eval()
    return model, PairEncoder(AutoTokenizer.from_pretrained(quickstart.POLICY_FOLDER), 104)


def questions(encoder: PairEncoder) -> list[list[int]]:
    return [encoder.tokenizer(prompt)["input_ids"] for prompt in quickstart.SAMPLE_PROMPTS]


def test_answers_do_not_depend_on_the_other_prompts_of_a_batch(generator: tuple[Any, PairEncoder]) -> None:
    """Prompts of different lengths are padded; greedy answers are those to each prompt alone."""
    model, encoder = generator
    prompts = questions(encoder)
    together = generate_answers(model, encoder, prompts, GREEDY_SAMPLING, 0)
    assert together == [generate_answers(model, encoder, [prompt], GREEDY_SAMPLING, 0)[0] for prompt in prompts]
    assert all(isinstance(answer, GeneratedAnswer) and answer.text for (answer,) in together)


def test_an_answer_ends_where_the_next_human_turn_begins(
    generator: tuple[Any, PairEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, encoder = generator
    written = encoder.tokenizer(" Kyoto.\n\nHuman: And then?", add_special_tokens=False)["input_ids"]
    prompt = questions(encoder)[0]
    end = encoder.end_ids[0]

    def generate(ids: torch.Tensor, **_: object) -> torch.Tensor:
        asked, padding = ids[0].tolist(), [end] * (len(written) - 1)
        return torch.tensor([[*asked, *written, end], [*asked, written[0], end, *padding]])

    monkeypatch.setattr(model, "generate", generate)
    (first, second), = generate_answers(model, encoder, [prompt], Sampling(2), 0)  # fmt: skip
    assert (first.text, first.is_complete, first.tokens[-1]) == ("Kyoto.", True, end)
    assert encoder.tokenizer.decode(first.tokens, skip_special_tokens=True).strip() == "Kyoto."
    assert (second.tokens, second.is_complete) == ([written[0], end], True)


def test_the_seed_determines_the_samples(generator: tuple[Any, PairEncoder]) -> None:
    first, same, other = (
        generate_answers(*generator, questions(generator[1]), Sampling(2, max_new_tokens=8), n) for n in (0, 0, 1)
    )
    assert first == same != other


def test_sampling_is_from_the_model_alone(generator: tuple[Any, PairEncoder]) -> None:
    """The generation config that comes with a model is ignored: its top_k of 1 would give equal answers."""
    model, encoder = generator
    prompt = questions(encoder)[:1]
    model.generation_config.top_k, model.generation_config.repetition_penalty = 1, 1.5
    (answers,) = generate_answers(model, encoder, prompt, Sampling(8, temperature=1.5, max_new_tokens=4), 0)
    assert len({tuple(answer.tokens) for answer in answers}) > 1
    (narrow,) = generate_answers(model, encoder, prompt, Sampling(8, top_p=1e-6, max_new_tokens=4), 0)
    assert len({tuple(answer.tokens) for answer in narrow}) == 1


def test_the_prompts_of_pairs_are_read(tmp_path: Path) -> None:
    row = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"prompt": [{"role": "no"}]}) + "\n")
    options = {"sampling": Sampling(max_new_tokens=8), "max_length": 64}
    data = Prompts(str(tmp_path), tokenizer="quickstart", on_bad_row="skip", **options)
    data.prepare_data()
    ((batch),) = data.predict_dataloader()
    assert [(q.id, q.prompt) for q in batch.prompts] == [("prompts:1", "\n\nHuman: a\n\nAssistant:")]
    assert isinstance(batch.prompts[0], EncodedPrompt)
    with pytest.raises(ValueError, match="line 2: wrong_type"):
        Prompts(str(tmp_path), tokenizer="quickstart", **options).predict_dataloader()

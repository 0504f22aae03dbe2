"""Evaluation harnesses: the real lm-eval against the server, compared with its own model on the same folder.

The requests that it sends are tested one by one with the official OpenAI client.
"""

import json
import math
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo import quickstart
from dpo.models.batch import Example, collate
from dpo.models.prompt_sharing import share_if_exact
from dpo.models.scoring import score, score_alternatives
from tests.support.serving import Running, options, run_server

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '\\n\\nHuman: ' if m.role == 'user' else '\\n\\nAssistant: ' }}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)
QUESTIONS = [
    {"question": "Which city is the capital of Japan?", "choices": ["It is Tokyo.", "Tea.", "Rain"], "answer": 0},
    {"question": "What is the best way to make tea?", "choices": ["Boil water", "A cat"], "answer": 1},
    {"question": "Is it late?", "choices": ["I am not sure about that.", "No", "Yes, it is"], "answer": 2},
]
PROMPT = "Human: {{question}}\n\nAssistant:"
TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
KINDS = {
    "choice": "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: answer\n",
    "loglikelihood": "output_type: loglikelihood\ndoc_to_target: '{{choices[0]}}'\n"
    "metric_list: [{metric: perplexity}, {metric: acc}]\n",
    "generate": "output_type: generate_until\ndoc_to_target: '{{choices[answer]}}'\n"
    "metric_list: [{metric: exact_match}]\n"
    "generation_kwargs: {until: ['?'], max_gen_toks: 12, do_sample: false}\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped policy with a chat template, as lm-eval needs one for messages."""
    folder = tmp_path_factory.mktemp("policy")
    model = AutoModelForCausalLM.from_pretrained(quickstart.POLICY_FOLDER)
    model.generation_config.max_new_tokens = None  # which would take precedence over what lm-eval asks for
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(quickstart.POLICY_FOLDER)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def running(folder: Path):
    with run_server(options(model=str(folder), reference=str(folder), port=0, max_concurrency=16)) as running:
        yield running


@pytest.fixture
def client(running: Running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def write_tasks(folder: Path) -> None:
    """Write one task of every kind over the same questions."""
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, kind in KINDS.items():
        text = f"task: {name}\n" + TASK.format(file=data) + f"doc_to_text: {json.dumps(PROMPT)}\n" + kind
        (folder / f"{name}.yaml").write_text(text)


@pytest.mark.filterwarnings("ignore")  # lm-eval and what it imports give warnings of their own
def test_lm_eval_gets_the_scores_of_its_own_model(running: Running, folder: Path, tmp_path: Path, monkeypatch) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[harness]'")
    from lm_eval.tasks import TaskManager

    write_tasks(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def evaluate(kind: str, tasks: list[str], chat: bool = False, **arguments: Any) -> dict[str, list[Any]]:
        got = lm_eval.simple_evaluate(
            model=kind, model_args=arguments, tasks=tasks, task_manager=manager, apply_chat_template=chat,
            bootstrap_iters=0, log_samples=True, cache_requests=False, verbosity="ERROR",
        )  # fmt: skip
        assert got["results"].keys() == set(tasks)
        return {task: [row["resps"] for row in got["samples"][task]] for task in tasks} | {"results": got["results"]}

    bos = {"add_bos_token": True}  # as the tokenizer does; lm-eval's models differ in their defaults
    own = bos | {"pretrained": str(folder), "device": "cpu", "dtype": "float32", "batch_size": 1}
    remote = bos | {"model": "policy", "tokenizer": str(folder), "tokenizer_backend": "huggingface", "max_length": 512}
    completions = remote | {"base_url": f"{running.url}/v1/completions", "num_concurrent": 1, "batch_size": 4}
    expected = evaluate("hf", list(KINDS), **own)
    got = evaluate("local-completions", list(KINDS), **completions)
    flags = []
    for task in ("choice", "loglikelihood"):
        for row, expected_row in zip(got[task], expected[task], strict=True):
            for [answer], [expected_answer] in zip(row, expected_row, strict=True):
                (logp, greedy), (expected_logp, expected_greedy) = map(_numbers, (answer, expected_answer))
                assert logp == pytest.approx(expected_logp, abs=1e-4)
                assert greedy == expected_greedy
                flags.append(greedy)
    assert got["generate"] == expected["generate"]
    assert any(text for [[text]] in got["generate"])
    assert got["results"].keys() == expected["results"].keys()
    for task, values in expected["results"].items():
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        assert {name: got["results"][task][name] for name in numbers} == pytest.approx(numbers, rel=1e-4)
        assert numbers
    chat = remote | {"base_url": f"{running.url}/v1/chat/completions", "tokenizer_backend": None}
    said, expected_said = (
        evaluate(kind, ["generate"], chat=True, **arguments)["generate"]
        for kind, arguments in (("local-chat-completions", chat), ("hf", own))
    )
    assert [text.strip() for [[text]] in said] == [text.strip() for [[text]] in expected_said]


def _numbers(answer: Any) -> tuple[float, bool]:
    """Return log-probability and greedy flag of a response, which lm-eval logs as text or as it is."""
    logp, greedy = answer
    return float(logp), str(greedy) == "True"


def test_echo_returns_the_logprobs_of_the_prompt(client, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = [
        tokenizer("Human: Which city is the capital of Japan? It is Tokyo.")["input_ids"],
        tokenizer("Tea")["input_ids"],
    ]
    options = {"model": "policy", "temperature": 0, "logprobs": 2, "echo": True}
    for max_tokens in (0, 1):
        got = client.completions.create(prompt=ids, max_tokens=max_tokens, **options)
        for choice, row in zip(got.choices, ids, strict=True):
            with torch.no_grad():
                logps = model(torch.tensor([row])).logits[0].log_softmax(-1)
            logprobs = choice.logprobs
            assert len(logprobs.token_logprobs) == len(logprobs.tokens) == len(logprobs.top_logprobs)
            assert len(logprobs.tokens) == len(row) + max_tokens
            assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
            expected = logps[:-1].gather(-1, torch.tensor(row[1:])[:, None])[:, 0].tolist()
            assert logprobs.token_logprobs[1 : len(row)] == pytest.approx(expected, abs=1e-4)
            best = [max(top.values()) for top in logprobs.top_logprobs[1 : len(row)]]
            assert best == pytest.approx(logps[:-1].max(-1).values.tolist(), abs=1e-4)
            hits = [value == top for value, top in zip(logprobs.token_logprobs[1 : len(row)], best, strict=True)]
            assert hits == [token == row[i + 1] for i, token in enumerate(logps[:-1].argmax(-1).tolist())]
            assert choice.text == "".join(logprobs.tokens)
            assert choice.finish_reason == "length" or max_tokens
            assert choice.text.startswith(tokenizer.decode(row, skip_special_tokens=True))
        assert got.usage.prompt_tokens == sum(map(len, ids))
        assert got.usage.completion_tokens == max_tokens * len(ids)
    plain = client.completions.create(model="policy", prompt=ids[1], echo=True, max_tokens=0)
    assert plain.choices[0].logprobs is None and plain.choices[0].text.strip() == "Tea"


def test_several_prompts_are_answered_like_each_alone(client, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["Human: Hi", "Which city is", "The"]
    options = {"model": "policy", "max_tokens": 8, "temperature": 1.0, "seed": 3}
    alone = [client.completions.create(prompt=text, **options).choices[0].text for text in texts]
    for prompts in (texts, tokenizer(texts)["input_ids"]):
        got = client.completions.create(prompt=prompts, n=2, **options)
        assert [choice.index for choice in got.choices] == list(range(6))
        assert [choice.text for choice in got.choices[::2]] == alone
        assert [choice.text for choice in got.choices[1::2]] != alone
        assert got.usage.prompt_tokens == sum(map(len, tokenizer(texts)["input_ids"]))


def test_chat_gives_n_answers_each_with_its_reward(running: Running) -> None:
    body = {"model": "policy", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "seed": 1}
    one = running.post("chat/completions", body)["choices"][0]
    got = running.post("chat/completions", body | {"n": 40, "reward": True})["choices"]  # more than the 16 slots
    assert [choice["index"] for choice in got] == list(range(40))
    assert got[0]["message"] == one["message"]
    assert len({choice["message"]["content"] for choice in got}) > 1
    assert all(
        choice["reward"]["reward"] == pytest.approx(0, abs=1e-5) for choice in got
    )  # the policy is the reference


def test_names_and_types_of_messages_do_not_change_the_answer(running: Running) -> None:
    message = {"role": "user", "content": "Which city is the capital of Japan?"}
    plain, named, typed = (
        running.post("chat/completions", {"model": "policy", "messages": [message | extra], "temperature": 0})
        for extra in ({}, {"name": "user_proxy"}, {"type": "text"})
    )
    assert named["choices"] == typed["choices"] == plain["choices"]
    assert named["usage"] == plain["usage"]


def test_text_becomes_tokens_and_back(running: Running, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def post(path: str, body: Any) -> Any:
        return httpx.post(f"{running.url}/{path}", json=body).json()

    for special in (True, False):
        got = post("tokenize", {"model": "policy", "prompt": "The tea </s>", "add_special_tokens": special})
        assert got["tokens"] == tokenizer("The tea </s>", add_special_tokens=special)["input_ids"]
        assert (got["count"], got["max_model_len"]) == (len(got["tokens"]), 512)
        assert post("detokenize", {"tokens": got["tokens"]}) == {"prompt": tokenizer.decode(got["tokens"])}
    messages = [{"role": "user", "content": "Hi"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    got = post("tokenize", {"messages": messages})["tokens"]
    assert got == tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert (
        "add_special_tokens" in post("tokenize", {"messages": messages, "add_special_tokens": True})["error"]["message"]
    )
    assert "below" in post("detokenize", {"tokens": [10**6]})["error"]["message"]
    assert [model["max_model_len"] for model in running.get("/v1/models").json()["data"]] == [512, 512]


def test_a_cut_answer_is_scored_without_the_end_that_it_never_had(running: Running) -> None:
    body = {"model": "policy", "messages": [{"role": "user", "content": QUESTIONS[1]["question"]}]}
    whole = running.post("chat/completions", body | {"temperature": 0})
    length = whole["usage"]["completion_tokens"] - 1  # all but the end
    assert length > 1, whole
    [cut] = running.post("chat/completions", body | {"temperature": 0, "reward": True, "max_tokens": length})["choices"]
    assert cut["message"] == whole["choices"][0]["message"]
    assert cut["finish_reason"] == "length" and cut["reward"]["length"] == length
    question = {"messages": body["messages"]}
    answers = {"answers": [cut["message"]["content"]] * 2, "finish_reasons": ["length", "stop"], "tokens": True}
    unfinished, finished = running.post("score", question | answers)["answers"]
    assert unfinished["length"] == length and finished["length"] == length + 1
    assert unfinished["tokens"] == [
        {name: pytest.approx(value, abs=1e-4) if name != "text" else value for name, value in token.items()}
        for token in finished["tokens"][:-1]
    ]
    assert unfinished["logprob"]["policy"] == pytest.approx(cut["reward"]["logprob"]["policy"], abs=1e-4)
    pair = question | {"chosen": answers["answers"][0], "rejected": "No.", "finish_reasons": ["length", "stop"]}
    [compared] = running.post("compare", {"pairs": [pair]})["pairs"]
    assert compared["chosen"]["logprob"]["policy"] == pytest.approx(unfinished["logprob"]["policy"], abs=1e-4)
    assert compared["rejected"]["length"] == len(
        running.post("score", question | {"answers": ["No."], "tokens": True})["answers"][0]["tokens"]
    )


@pytest.mark.parametrize("chunk_logits", [2**25, 40])
def test_alternatives_are_equal_to_the_score_of_the_training(tiny_model, monkeypatch, chunk_logits: int) -> None:
    monkeypatch.setattr("dpo.models.scoring.CHUNK_LOGITS", chunk_logits)
    model = tiny_model("llama")
    share_if_exact(model)
    batch = collate([Example("x", [5], ([6, 7, 8], [9])), Example("y", [3, 4], ([5, 6],))])
    for count in (0, 3):
        logps, tokens = score_alternatives(model, batch, count)
        assert logps.shape == tokens.shape == (6, 1 + count)
        assert logps[:, 0].tolist() == score(model, batch).logps.tolist()
        assert tokens[:, 0].tolist() == batch.targets.tolist()
    assert (logps[:, 1:].diff() <= 0).all()
    assert torch.equal(logps[:, 0] == logps[:, 1], tokens[:, 0] == tokens[:, 1])
    assert math.isfinite(logps.sum().item())

"""The API as clients see it: through the official OpenAI client, and the scoring routes that OpenAI does not have."""

import math

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.models.batch import Example, collate
from dpo.models.prompt_sharing import share_if_exact
from dpo.models.scoring import score
from tests.support.serving import Running, trained_server

QUESTION = "What is the best way to make tea?"
ASKED = [{"role": "user", "content": QUESTION}]
PROMPT = f"\n\nHuman: {QUESTION}\n\nAssistant:"
LEARNED = "\n\nHuman: Which city is the capital of Japan?\n\nAssistant:"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory):
    with trained_server(tmp_path_factory) as running:
        yield running


@pytest.fixture
def client(running: Running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def served_model(running: Running, name: str = "policy"):
    path = getattr(running.service.served, f"{name}_path")
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def test_both_models_are_listed(client) -> None:
    assert [model.id for model in client.models.list()] == ["policy", "reference"]


@pytest.mark.parametrize("name", ["policy", "reference"])
def test_greedy_equals_generate_token_for_token(client, running: Running, name: str) -> None:
    model, tokenizer = served_model(running, name)
    for prompt in (PROMPT, LEARNED, "The"):
        ids = tokenizer(prompt, return_tensors="pt")
        expected = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
        got = client.completions.create(model=name, prompt=prompt, max_tokens=24, temperature=0, logprobs=0)
        assert got.usage.completion_tokens == len(expected)
        assert got.choices[0].text == tokenizer.decode(expected, skip_special_tokens=True)
        assert got.choices[0].finish_reason == ("stop" if expected[-1] == tokenizer.eos_token_id else "length")


def test_a_stream_gives_the_same_answer_as_a_plain_reply(client) -> None:
    options = {"model": "policy", "messages": ASKED, "seed": 5, "max_tokens": 20, "temperature": 0.9, "top_p": 0.9}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    assert "".join(part.choices[0].delta.content for part in parts) == whole.choices[0].message.content
    assert [part.choices[0].finish_reason for part in parts][-1] == whole.choices[0].finish_reason
    assert all(part.choices[0].finish_reason is None for part in parts[:-1])
    assert last.choices == [] and last.usage == whole.usage
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_chat_uses_the_format_of_the_training(client) -> None:
    chat = client.chat.completions.create(model="policy", messages=ASKED, temperature=0, max_tokens=30)
    plain = client.completions.create(model="policy", prompt=PROMPT, temperature=0, max_tokens=30)
    assert f" {chat.choices[0].message.content}" == plain.choices[0].text


def test_a_reply_can_be_sent_back_unchanged_and_text_may_come_in_parts(client) -> None:
    """Clients continue a conversation with the last reply's message object, including all its empty fields."""

    def answer(messages):
        return client.chat.completions.create(model="policy", messages=messages, temperature=0, max_tokens=12)

    first = answer(ASKED).choices[0].message
    again = [*ASKED, first, {"role": "user", "content": "And coffee?"}]
    plain = [*ASKED, {"role": "assistant", "content": first.content}, {"role": "user", "content": "And coffee?"}]
    parts = [*plain[:2], {"role": "user", "content": [{"type": "text", "text": t} for t in ("And ", "coffee?")]}]
    nulls = [*plain[:2], plain[2] | {"name": None, "tool_calls": None, "audio": None}]
    expected = answer(plain)
    assert expected.usage.prompt_tokens > answer(ASKED).usage.prompt_tokens
    for messages in (again, parts, nulls):
        got = answer(messages)
        assert (got.choices[0].message, got.usage) == (expected.choices[0].message, expected.usage)
    picture = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    with pytest.raises(openai.BadRequestError, match="content"):
        answer([{"role": "user", "content": picture}])


def test_a_reply_that_a_client_joined_from_a_stream_can_be_sent_back(client) -> None:
    """Clients concatenate the fields of all chunks, the role included; old ones add an empty list of tool calls."""
    options = {"model": "policy", "messages": ASKED, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options).choices[0].message
    with client.chat.completions.stream(**options) as stream:
        joined = stream.get_final_completion().choices[0].message
    assert (joined.role, joined.content) == (whole.role, whole.content)
    for reply in (joined, {"role": "assistant", "content": joined.content, "tool_calls": []}):
        client.chat.completions.create(**options | {"messages": [*ASKED, reply, *ASKED]})
    called = whole.model_dump() | {"tool_calls": [{"id": "1", "type": "function", "function": {"name": "f"}}]}
    with pytest.raises(openai.BadRequestError, match="tool_calls"):
        client.chat.completions.create(**options | {"messages": [*ASKED, called, *ASKED]})


def test_a_single_prompt_may_be_in_a_list(client) -> None:
    """LangChain sends it so."""
    options = {"model": "policy", "max_tokens": 8, "temperature": 0}
    alone, listed = (client.completions.create(prompt=prompt, **options) for prompt in (PROMPT, [PROMPT]))
    assert (listed.choices, listed.usage) == (alone.choices, alone.usage)


def test_zero_temperature_and_zero_top_p_are_greedy(client) -> None:
    def answer(**sampling) -> str:
        options = {"model": "policy", "messages": ASKED, "max_tokens": 12} | sampling
        return client.chat.completions.create(**options).choices[0].message.content

    greedy = answer(temperature=0)
    assert greedy == answer(temperature=0, seed=9) == answer(temperature=1.5, top_p=0)
    assert len({answer(temperature=1.5, seed=seed) for seed in range(6)}) > 1
    assert answer(temperature=1.5, seed=3) == answer(temperature=1.5, seed=3)


def test_a_stop_string_is_never_shown(client) -> None:
    options = {"model": "policy", "prompt": PROMPT, "temperature": 0, "max_tokens": 24}
    text = client.completions.create(**options).choices[0].text
    stop = text[4:9]  # begins and ends inside words, and spans tokens
    whole = client.completions.create(**options, stop=[stop, "never said"])
    parts = client.completions.create(**options, stop=stop, stream=True)
    assert whole.choices[0].text == "".join(part.choices[0].text for part in parts) == text[: text.index(stop)]
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens < client.completions.create(**options).usage.completion_tokens


def test_an_answer_ends_at_its_maximum_length(client) -> None:
    for limit in ({"max_tokens": 2}, {"max_completion_tokens": 2}):
        got = client.chat.completions.create(model="policy", messages=ASKED, temperature=0, **limit)
        assert (got.choices[0].finish_reason, got.usage.completion_tokens) == ("length", 2)


def test_logprobs_are_those_of_the_model_at_any_temperature(client, running: Running) -> None:
    model, tokenizer = served_model(running)
    got = client.chat.completions.create(
        model="policy", messages=ASKED, max_tokens=8, temperature=1.7, top_p=0.8, seed=1, logprobs=True, top_logprobs=3
    )
    content = got.choices[0].logprobs.content
    prompt = tokenizer(PROMPT)["input_ids"]
    answer = tokenizer(" " + got.choices[0].message.content)["input_ids"][1:]
    with torch.no_grad():
        logps = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for i, token in enumerate(answer[: len(content)]):
        assert content[i].logprob == pytest.approx(logps[i, token].item(), abs=1e-4)
        assert [t.logprob for t in content[i].top_logprobs] == pytest.approx(logps[i].topk(3).values.tolist(), abs=1e-4)
    legacy = client.completions.create(model="policy", prompt=PROMPT, max_tokens=4, temperature=0, logprobs=2)
    assert len(legacy.choices[0].logprobs.token_logprobs) == legacy.usage.completion_tokens
    assert "".join(legacy.choices[0].logprobs.tokens) == legacy.choices[0].text
    offsets, tokens = legacy.choices[0].logprobs.text_offset, legacy.choices[0].logprobs.tokens
    assert offsets == [len("".join(tokens[:i])) for i in range(len(tokens))]
    options = {"model": "policy", "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "logprobs": 2}
    parts = [part.choices[0].logprobs for part in client.completions.create(**options, stream=True)]
    assert [offset for part in parts for offset in part.text_offset] == offsets
    assert [token for part in parts for token in part.tokens] == tokens


def test_a_reward_is_returned_on_request(running: Running) -> None:
    body = {"model": "policy", "messages": [{"role": "user", "content": LEARNED[9:-13]}], "temperature": 0}
    plain = running.post("chat/completions", body)
    rewarded = running.post("chat/completions", body | {"reward": True})
    [choice], [expected] = rewarded["choices"], plain["choices"]
    reward = choice.pop("reward")
    assert choice == expected and choice["finish_reason"] == "stop"
    answer = choice["message"]["content"]
    scored = running.post("score", {"messages": body["messages"], "answers": [answer]})["answers"][0]
    assert reward["reward"] == pytest.approx(scored["reward"], abs=1e-5)
    with httpx.stream(
        "POST", f"{running.url}/v1/chat/completions", json=body | {"reward": True, "stream": True}
    ) as got:
        assert '"reward"' in list(got.iter_lines())[-4]  # the chunk before [DONE]


def test_the_reward_is_that_of_the_text_before_a_stop_string(running: Running) -> None:
    body = {"model": "policy", "messages": [{"role": "user", "content": LEARNED[9:-13]}], "temperature": 0}
    whole = running.post("chat/completions", body)["choices"][0]["message"]["content"]
    stop = " " + whole.split()[3]  # a word starts with a token of its own
    [got] = running.post("chat/completions", body | {"reward": True, "stop": stop})["choices"]
    answer = got["message"]["content"]
    assert answer == whole[: whole.index(stop)]
    scored = running.post("score", {"messages": body["messages"], "answers": [answer], "tokens": True})["answers"][0]
    *tokens, _ = scored["tokens"]  # the last is the end of sequence, which was not generated
    assert got["reward"]["length"] == len(tokens)
    for name in ("policy", "reference"):
        assert got["reward"]["logprob"][name] == pytest.approx(sum(token[name] for token in tokens), abs=1e-4)


def test_scores_equal_those_of_the_training(running: Running) -> None:
    answers = ["Put it in a cup.", "I do not know."]
    got = running.post("score", {"prompt": QUESTION, "answers": answers, "tokens": True})
    _, tokenizer = served_model(running)
    prompt = tokenizer(PROMPT)["input_ids"]
    rows = [[*tokenizer(f" {answer}")["input_ids"][1:], tokenizer.eos_token_id] for answer in answers]
    batch = collate([Example("x", prompt, tuple(rows))])
    expected = {}
    for name in ("policy", "reference"):
        model, _ = served_model(running, name)
        share_if_exact(model)
        with torch.no_grad():
            expected[name] = [part.tolist() for part in score(model, batch).logps.split(batch.lengths)]
    for i, (answer, row) in enumerate(zip(got["answers"], rows, strict=True)):
        for name in expected:
            assert [t[name] for t in answer["tokens"]] == pytest.approx(expected[name][i], abs=1e-4)
            assert answer["logprob"][name] == pytest.approx(math.fsum(expected[name][i]), abs=1e-4)
        assert answer["length"] == len(row)
        assert "".join(token["text"] for token in answer["tokens"]) == f" {answers[i]}"
        assert answer["tokens"][-1]["text"] == ""  # the end of sequence
        margin = answer["logprob"]["policy"] - answer["logprob"]["reference"]
        assert answer["reward"] == pytest.approx(got["beta"] * margin)
    assert got["beta"] == 0.25  # from origin.json


def test_compare_returns_what_the_policy_prefers(running: Running) -> None:
    pair = {"prompt": LEARNED, "chosen": "It is Tokyo.", "rejected": "Tea."}
    swapped = {"prompt": LEARNED, "chosen": "Tea.", "rejected": "It is Tokyo."}
    got = running.post("compare", {"pairs": [pair, swapped]})["pairs"]
    for result in got:
        margin = result["chosen"]["reward"] - result["rejected"]["reward"]
        assert result["margin"] == pytest.approx(margin)
        assert result["probability"] == pytest.approx(1 / (1 + math.exp(-margin)))
        assert result["preferred"] == ("chosen" if margin > 0 else "rejected")
        assert "tokens" not in result["chosen"]
    assert got[0]["margin"] == pytest.approx(-got[1]["margin"], abs=1e-5)
    assert got[0]["margin"] != 0


def test_messages_and_dialogue_text_are_equivalent(running: Running) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, *ASKED]
    text = f"\n\nHuman: Hi\n\nAssistant: Hello.{PROMPT}"
    one, two = ({"messages": turns}, {"prompt": text})
    assert running.post("score", one | {"answers": ["Yes."]}) == running.post("score", two | {"answers": ["Yes."]})


def test_the_run_route_returns_the_results(running: Running) -> None:
    run = running.get("/v1/run").json()
    assert run["name"] == "trained" and run["results"]["header"][0] == "step"
    assert run["metrics"][0] == {"step": 1.0, "train/loss": 0.7, "val/loss": None}
    assert run["values"] == {"val/loss": 0.6, "val/odd": None} and "beta: 0.25" in run["config"]
    assert run["held_out"] == [{"prompt": LEARNED, "chosen": " Tokyo.", "rejected": " Tea."}]


def test_requests_show_in_the_metrics(running: Running) -> None:
    running.post("chat/completions", {"model": "policy", "messages": ASKED, "max_tokens": 3, "temperature": 0})
    text = running.get("/metrics").text
    for name in ("dpo_requests_total{", "dpo_tokens_total{", "dpo_first_token_seconds_count{", "dpo_active_requests{"):
        assert name in text
    assert 'route="/v1/chat/completions",status="200"' in text
    assert 'dpo_engine_alive{model="policy"} 1.0' in text

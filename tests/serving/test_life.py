"""The life of a server: many requests at a time, disconnecting clients, a dying engine, signals, start-up errors."""

import asyncio
import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo.__main__ import main
from dpo.runs.folder import run_of_export
from dpo.serving import service
from dpo.serving.server import find_served_policy, load_service
from tests.support.runs import Lab, checkpoint, policy
from tests.support.serving import Running, options, run_server, start, trained_server, wait_until

ROOT = Path(__file__).resolve().parents[2]
CHAT = {"model": "policy", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "temperature": 0}
LONG = {"model": "policy", "prompt": "x y z", "max_tokens": 480, "temperature": 2.0, "stream": True}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory):
    with trained_server(tmp_path_factory) as running:
        yield running


def idle(running: Running) -> bool:
    return running.service.active_requests == 0 and all(
        not engine.result_queues for engine in running.service.engines.values()
    )


def batched(running: Running) -> int:
    """Number of requests inside the batching threads."""
    schedulers = [engine.manager.batch_processor.scheduler for engine in running.service.engines.values()]
    return sum(len(scheduler.active_requests) + len(scheduler.waiting_requests) for scheduler in schedulers)


def test_two_hundred_at_once(running: Running) -> None:
    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:
            url = f"{running.url}/v1/chat/completions"
            return await asyncio.gather(*[client.post(url, json=CHAT | {"max_tokens": 40}) for _ in range(200)])

    replies = asyncio.run(run())
    assert {reply.status_code for reply in replies} == {200, 429}
    for reply in replies:
        if reply.status_code == 429:
            assert int(reply.headers["retry-after"]) >= 1 and reply.json()["error"]["type"] == "rate_limit_error"
    assert len({reply.json()["choices"][0]["message"]["content"] for reply in replies if reply.status_code == 200}) == 1
    wait_until(lambda: idle(running))


@pytest.mark.parametrize("streamed", [True, False])
def test_requests_of_disconnected_clients_are_removed(running: Running, streamed: bool) -> None:
    async def run() -> None:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:

            async def ask() -> None:
                body = LONG | {"stream": streamed}
                async with client.stream("POST", f"{running.url}/v1/completions", json=body) as reply:
                    async for _ in reply.aiter_bytes():
                        pass

            tasks = [asyncio.create_task(ask()) for _ in range(50)]
            await asyncio.sleep(0.3)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())
    started = time.perf_counter()
    assert running.post("chat/completions", CHAT)
    assert time.perf_counter() - started < 1
    wait_until(lambda: idle(running) and not batched(running), 3)


def test_scores_are_exact_under_load(running: Running) -> None:
    questions = [{"prompt": f"Question {i}?", "answers": [f"Answer {i}.", "No."]} for i in range(50)]

    def logprobs(reply: dict) -> list[float]:
        return [value for answer in reply["answers"] for value in answer["logprob"].values()]

    alone = [logprobs(running.post("score", question)) for question in questions]

    async def run() -> list[list[float]]:
        async with httpx.AsyncClient(timeout=60) as client:

            async def noise(model: str) -> None:
                while True:
                    await client.post(f"{running.url}/v1/completions", json=LONG | {"model": model, "stream": False})

            noisy = [asyncio.create_task(noise(model)) for model in ("policy", "reference")]
            await asyncio.sleep(0.2)
            posts = [client.post(f"{running.url}/v1/score", json=question) for question in questions]
            scored = [
                reply.json() for part in range(0, 50, 10) for reply in await asyncio.gather(*posts[part : part + 10])
            ]
            for task in noisy:
                task.cancel()
            await asyncio.gather(*noisy, return_exceptions=True)
            return [logprobs(reply) for reply in scored]

    busy = asyncio.run(run())
    assert max(abs(a - b) for one, two in zip(alone, busy, strict=True) for a, b in zip(one, two, strict=True)) < 1e-4


def test_an_answer_does_not_depend_on_the_rest_of_the_batch(running: Running) -> None:
    body = CHAT | {"temperature": 1.0, "max_tokens": 30}

    async def run() -> list[str]:
        async with httpx.AsyncClient(timeout=60) as client:
            url = f"{running.url}/v1/chat/completions"
            replies = await asyncio.gather(*[client.post(url, json=body | {"seed": seed}) for seed in range(8)])
            return [reply.json()["choices"][0]["message"]["content"] for reply in replies]

    together = asyncio.run(run())
    alone = [running.post("chat/completions", body | {"seed": i})["choices"][0]["message"]["content"] for i in range(8)]
    assert together == alone and len(set(alone)) > 4


def test_a_dead_engine_is_reported_and_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "RESTART_DELAY_SECONDS", 4.0)  # leaves time for requests in between
    with run_server(options("--demo", port=0, max_concurrency=4)) as running:
        engine = running.service.engines["policy"]

        def length(seed: int) -> int:
            return running.post("completions", LONG | {"seed": seed, "stream": False})["usage"]["completion_tokens"]

        seed = next(seed for seed in range(100) if length(seed) > 9)  # shorter answers end before the failure
        step, steps = engine.manager.batch_processor._generation_step, itertools.count()

        def failing_step(*arguments: object) -> None:
            if next(steps) == 5:
                raise RuntimeError("out of memory")
            step(*arguments)

        engine.manager.batch_processor._generation_step = failing_step
        with httpx.stream("POST", f"{running.url}/v1/completions", json=LONG | {"seed": seed}, timeout=20) as reply:
            rest = "".join(reply.iter_lines())
        assert rest.count('"choices"') > 1 and '"type": "server_error"' in rest and "[DONE]" not in rest
        assert not engine.is_alive
        codes = {running.get("/ready").status_code for _ in range(3)}
        assert codes == {503} and running.get("/health").status_code == 200
        refused = httpx.post(f"{running.url}/v1/chat/completions", json=CHAT)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "unavailable"
        wait_until(lambda: running.get("/ready").status_code == 200, 15)
        assert running.post("chat/completions", CHAT)


@pytest.mark.parametrize("sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_streams_and_the_process(sent: signal.Signals) -> None:
    with start("--demo", DPO_API_KEY="planted-key-9b1c") as (process, url):
        key = {"authorization": "Bearer planted-key-9b1c"}
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, headers=key, timeout=30) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(sent)
            started = time.perf_counter()
            last = [line for line in lines if line][-1]
        assert last == "data: [DONE]" or '"error"' in last
        out, err = process.communicate(timeout=12)
        assert time.perf_counter() - started < 10
    assert process.returncode in (0, 130, -sent, 128 + sent)
    assert "planted-key" not in out + err and "Traceback" not in err, err


def test_without_a_run_the_message_says_what_to_type(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["serve"]) == 1
    message = capsys.readouterr().err
    assert "make fit" in message and "--demo" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--device nowhere", "--device nowhere"),
        ("--port 65536", "--port of 0 to 65535"),
        ("--max-context 1", "at least 2 tokens"),
        ("--max-context 0", "at least 2 tokens"),
        ("--max-context 5000", "--max-context: expected at most 512 tokens"),
        ("--max-concurrency 0", "--max-concurrency of at least 1"),
        ("--host 0.0.0.0", "set a key in DPO_API_KEY"),
        ("--reference {other}", "must share a vocabulary"),
        ("--reference {other}/nowhere", "expected the folder of a model or its hub id"),
    ],
)
def test_a_server_that_cannot_start_says_why(arguments: str, message: str, tmp_path: Path, tiny_model, capsys) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    assert main(["serve", "--demo", *arguments.format(other=tmp_path).split()]) == 1
    assert message in capsys.readouterr().err


def test_demo_and_model_exclude_each_other(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--demo", "--model=anything"])
    assert "argument --model: not allowed with argument --demo" in capsys.readouterr().err


def test_help_fits_a_screen_and_does_not_wait_for_torch() -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / "serve.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert 10 < len(lines) <= 30 and max(map(len, lines)) <= 80
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported and "torch" not in imported


@pytest.mark.parametrize("adapter", [(), ("--model.adapter=LoRA",)], ids=["all weights", "adapter"])
def test_a_moving_reference_is_served_as_it_was_at_the_end(tmp_path: Path, adapter: tuple[str, ...]) -> None:
    moving = "--model.reference={class_path: Moving, init_args: {alpha: 0.5, tau: 1}}"
    run = Lab(tmp_path).fit("moving", moving, *adapter, "--trainer.max_steps=2", "--optimizer.lr=0.01")
    served = load_service(options(model=str(run.export_folder), device="cpu")).engines["reference"].model.state_dict()
    weights = checkpoint(run)["state_dict"]
    expected = {name[16:]: weight for name, weight in weights.items() if name.startswith("reference.model.")}
    assert expected
    for name, weight in expected.items():
        assert torch.equal(served[name], weight)
    start = AutoModelForCausalLM.from_pretrained(policy()).state_dict()
    assert any(not torch.equal(weight, start[name]) for name, weight in expected.items())
    (run.checkpoint_folder / "last.ckpt").unlink()
    with pytest.raises(ValueError, match=r"last\.ckpt, which holds it, is gone: name a model with --reference"):
        find_served_policy(options(model=str(run.export_folder)))
    assert (
        find_served_policy(options(model=str(run.export_folder), reference="quickstart")).reference_checkpoint is None
    )


def test_a_run_without_a_reference_is_served_with_a_note(tmp_path: Path, capsys) -> None:
    run = Lab(tmp_path).fit("free", "--model.loss=SimPO", "--trainer.max_steps=1")
    with run_server(options(model=str(run.export_folder), device="cpu", port=0)) as running:
        run_route = running.get("/v1/run").json()
    assert (run_route["policy"], run_route["reference"]) == (str(run.export_folder), str(policy()))
    assert "trained without a reference" in run_route["note"]
    assert f"note       {run_route['note']}" in capsys.readouterr().out


def test_the_server_reads_what_a_run_writes(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    run = lab.fit("real", "--trainer.max_steps=1", "--model.loss.beta=0.3", "--data.format=hh")
    served = find_served_policy(options(model=str(run.export_folder)))
    assert (served.beta, served.format, served.reference_path) == (0.3, "hh", str(policy()))
    assert run_of_export(served.policy_path).folder == run.folder.resolve()

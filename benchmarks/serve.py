"""Benchmark of the server under load against `generate` behind a lock and `transformers serve --continuous-batching`.

`python benchmarks/serve.py [--rounds 7] [--threads 1]` makes a random 7.3M-parameter Llama whose greedy answers have
exactly `TOKENS` tokens, serves it as policy and reference, and writes benchmarks/results/serve.json and serve.md. The
contestants take turns in every round; the ratios between them matter, not the absolute figures.
"""

import argparse
import asyncio
import importlib.metadata
import itertools
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CLIENTS, TOKENS = 32, 48
PROMPTS = [f"\n\nHuman: Tell me about city number {i} of the list.\n\nAssistant:" for i in range(200)]


def make_model(folder: Path) -> None:
    """Save a random Llama whose greedy answers never end and consist of printable tokens."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "dpo" / "quickstart" / "policy")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=320, intermediate_size=864, num_hidden_layers=5, num_attention_heads=5,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for token in range(len(tokenizer)):
            if not tokenizer.decode([token], skip_special_tokens=True).isprintable() or token < 3:
                model.lm_head.weight[token] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def process(command: list[str], url: str, threads: int) -> Iterator[int]:
    """Run a server process; gives its id once it answers."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server:
        try:
            for _ in range(600):
                try:
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.2)
            yield server.pid
        finally:
            server.terminate()
            try:
                server.wait(12)
            except subprocess.TimeoutExpired:  # transformers serve does not always end
                server.kill()


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def stream(client: httpx.AsyncClient, url: str, model: str, prompt: str) -> float:
    """Stream one answer, and return the seconds to its first token."""
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True}
    started, first = time.perf_counter(), 0.0
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data:") and not first:
                first = time.perf_counter() - started
    return first


async def load(url: str, models: list[str], clients: int, requests: int) -> dict[str, float]:
    """Return tokens per second and mean seconds to the first token, for clients that each send requests in a row."""
    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None)) as client:

        async def ask(i: int) -> list[float]:
            return [await stream(client, url, models[i % len(models)], PROMPTS[i + n]) for n in range(requests)]

        started = time.perf_counter()
        firsts = await asyncio.gather(*map(ask, range(clients)))
    seconds = time.perf_counter() - started
    return {"tokens/s": clients * requests * TOKENS / seconds, "ttft": statistics.mean(itertools.chain(*firsts))}


class FirstToken:
    """A streamer that records when each token arrives."""

    def __init__(self) -> None:
        self.puts: list[float] = []

    def put(self, value: object) -> None:
        """Record the time; the first call is for the prompt."""
        self.puts.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing at the end of the answer."""


def locked(model: Any, tokenizer: Any, clients: int) -> dict[str, float]:
    """Return the same as `load` for `generate` behind a lock, without HTTP."""
    lock, firsts, started = threading.Lock(), [], time.perf_counter()

    def ask(prompt: str) -> None:
        streamer = FirstToken()
        ids = tokenizer(prompt, return_tensors="pt")
        with lock:
            model.generate(**ids, max_new_tokens=TOKENS, do_sample=False, streamer=streamer)
        firsts.append(streamer.puts[1] - started)

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in PROMPTS[:clients]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"tokens/s": clients * TOKENS / (time.perf_counter() - started), "ttft": statistics.mean(firsts)}


async def rewards(url: str) -> dict[str, float]:
    """Return the median seconds of a reply without and with its reward, and of scoring an answer."""
    messages = [{"role": "user", "content": "Tell me."}]
    body = {"model": "policy", "messages": messages, "temperature": 0, "max_tokens": TOKENS}
    question = {"messages": messages, "answers": ["word " * 20]}
    times: dict[str, list[float]] = {"without": [], "with": [], "score": []}
    async with httpx.AsyncClient(timeout=60) as client:
        for _ in range(10):
            for name, path, json_body in (
                ("without", "chat/completions", body),
                ("with", "chat/completions", body | {"reward": True}),
                ("score", "score", question),
            ):
                started = time.perf_counter()
                (await client.post(f"{url}/v1/{path}", json=json_body)).raise_for_status()
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


async def exactness(url: str, idle: str) -> float:
    """Return the largest difference, in nats, between 50 scores under load and those of an idle server."""
    bodies = [{"prompt": prompt, "answers": ["one two three", f"four {i}"]} for i, prompt in enumerate(PROMPTS[:50])]

    async def scores(client: httpx.AsyncClient, server: str) -> list[float]:
        replies = [(await client.post(f"{server}/v1/score", json=body)).json() for body in bodies]
        return [value for r in replies for answer in r["answers"] for value in answer["logprob"].values()]

    async with httpx.AsyncClient(timeout=300) as client:
        busy = asyncio.create_task(load(url, ["policy", "reference"], CLIENTS, 2))
        under_load = await scores(client, url)
        await busy
        alone = await scores(client, idle)
    return max(abs(a - b) for a, b in zip(under_load, alone, strict=True))


async def storms(url: str) -> dict[str, Any]:
    """Return the status codes of 200 requests at once, and the seconds of a chat after 50 dropped streams."""
    body = {"model": "policy", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 200, "temperature": 0}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        path = f"{url}/v1/chat/completions"
        codes = [r.status_code for r in await asyncio.gather(*[client.post(path, json=body) for _ in range(200)])]
        streams = [asyncio.create_task(stream(client, url, "policy", prompt)) for prompt in PROMPTS[:50]]
        await asyncio.sleep(0.5)
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        started = time.perf_counter()
        (await client.post(path, json=body | {"max_tokens": 4})).raise_for_status()
    return {
        "codes": {str(code): codes.count(code) for code in sorted(set(codes))},
        "after": time.perf_counter() - started,
    }


def machine() -> dict[str, Any]:
    """Return the processor and the versions that the benchmark ran on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "fastapi", "uvicorn")}
    cpu = ", ".join(sorted(names)) or platform.processor()
    system = {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version()}
    return {**system, **versions, "date": str(date.today())}


def measure(rounds: int, threads: int) -> dict[str, Any]:
    """Run all benchmarks, the contestants alternating in every round."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name) / "model"
        make_model(folder)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        ports = [free_port() for _ in range(3)]
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        ours = [sys.executable, str(ROOT / "serve.py"), "--model", str(folder), "--reference", str(folder), "--port"]
        theirs = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder), "--continuous-batching"]
        theirs += ["--cb-num-blocks", "128", "--cb-block-size", "256", "--cb-max-batch-tokens", "512"]
        theirs += ["--attn-implementation", "sdpa", "--device", "cpu", "--port", str(ports[1])]
        for command, url in zip(([*ours, str(ports[0])], theirs, [*ours, str(ports[2])]), urls, strict=True):
            stack.enter_context(process(command, url, threads))
        both = ["policy", "reference"]
        runs = {
            "theirs 32": lambda: asyncio.run(load(urls[1], [str(folder)], CLIENTS, 1)),
            "ours 32": lambda: asyncio.run(load(urls[0], ["policy"], CLIENTS, 1)),
            "ours 1": lambda: asyncio.run(load(urls[0], ["policy"], 1, 4)),
            "ours 32, both models": lambda: asyncio.run(load(urls[0], both, CLIENTS, 1)),
            "locked 32": lambda: locked(model, tokenizer, CLIENTS),
        }
        asyncio.run(load(urls[0], both, 2, 1))  # warm up
        asyncio.run(load(urls[1], [str(folder)], 2, 1))
        results: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                results[name].append(run())
                print(name, results[name][-1], flush=True)
        extra = {"reward": asyncio.run(rewards(urls[0])), "nats": asyncio.run(exactness(urls[0], urls[2]))}
        return {"machine": machine() | {"threads": threads}, "runs": results, **extra, **asyncio.run(storms(urls[0]))}


def table(values: dict[str, Any]) -> str:
    """Return targets and measurements as a Markdown table."""

    def median(name: str, what: str) -> float:
        return statistics.median(run[what] for run in values["runs"][name])

    def ratio(over: str, under: str, what: str = "tokens/s") -> float:
        """Return the median ratio over the rounds, as other load on the machine affects both sides of a round."""
        rounds = zip(values["runs"][over], values["runs"][under], strict=True)
        return statistics.median(one[what] / other[what] for one, other in rounds)

    reward, codes = values["reward"], values["codes"]
    replies = " / ".join(f"{1000 * reward[name]:.0f} ms" for name in ("without", "with", "score"))
    rows = [
        ("32 streams against one client, tokens/s", ">= 4x", f"{ratio('ours 32', 'ours 1'):.2f}x"),
        ("32 streams against `generate` behind a lock", ">= 3.5x", f"{ratio('ours 32', 'locked 32'):.2f}x"),
        ("time to first token against that", "<= 0.2x", f"{ratio('ours 32', 'locked 32', 'ttft'):.3f}x"),
        ("32 streams against `transformers serve`", ">= 1.0x", f"{ratio('ours 32', 'theirs 32'):.2f}x"),
        ("the same, spread over both models", "-", f"{ratio('ours 32, both models', 'theirs 32'):.2f}x"),
        ("reply without / with its reward / a score", "one forward pass per model", replies),
        ("scores under load against an idle server", "<= 1e-4 nats", f"{values['nats']:.1e}"),
        ("200 requests at once", "200 or 429", ", ".join(f"{n} x {code}" for code, n in codes.items())),
        ("next chat after 50 dropped streams", "<= 1 s", f"{values['after']:.2f} s"),
    ]
    lines = [f"| {' | '.join(row)} |" for row in [("", "target", "measured"), ("---", "---", "---"), *rows]]
    means = [
        f"- {name}: {median(name, 'tokens/s'):.0f} tokens/s, first token after {median(name, 'ttft'):.2f} s"
        for name in values["runs"]
    ]
    where = ", ".join(f"{name} {value}" for name, value in values["machine"].items())
    return "\n".join(["# The server under load", "", *lines, "", "Medians:", *means, "", where, ""])


def main() -> None:
    """Run the benchmark, and print and store the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="repetitions (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each server (%(default)s)")
    values = measure(**vars(parser.parse_args()))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "serve.json").write_text(json.dumps(values, indent=1) + "\n")
    (RESULTS / "serve.md").write_text(table(values))
    print(table(values))


if __name__ == "__main__":
    main()

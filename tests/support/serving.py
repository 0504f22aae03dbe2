"""A server in a thread of the test process, or in a process of its own, that serves a small run."""

import json
import os
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo import quickstart
from dpo.cli.serve import parse_options
from dpo.models.origin import PolicyOrigin, save_policy
from dpo.serving.server import InferenceServer, load_service
from dpo.serving.service import InferenceService

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "model: {init_args: {loss: {class_path: dpo.losses.DPO, init_args: {beta: 0.25}}}}\n"


def make_run(folder: Path) -> Path:
    """Write a run whose policy differs a little from the shipped one, and return its export."""
    export = folder / "export"
    model = AutoModelForCausalLM.from_pretrained(quickstart.POLICY_FOLDER)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * parameter.std() * torch.randn_like(parameter)
    tokenizer = AutoTokenizer.from_pretrained(quickstart.POLICY_FOLDER)
    save_policy(export, model, tokenizer, PolicyOrigin("quickstart", "quickstart", beta=0.25))
    (export / "train_config.yaml").write_text(CONFIG)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "results.csv").write_text("step,training loss\n1,0.7\n")
    (folder / "metrics.csv").write_text("step,train/loss,val/loss\n1,0.7,\n2,,0.6\n")
    (folder / "results.json").write_text('{"val/loss": 0.6, "val/odd": NaN}')
    pair = {"prompt": "\n\nHuman: Which city is the capital of Japan?\n\nAssistant:"}
    (folder / "held_out.jsonl").write_text(json.dumps(pair | {"chosen": " Tokyo.", "rejected": " Tea."}) + "\n")
    return export


@dataclass(frozen=True)
class Running:
    """A running server."""

    server: InferenceServer
    headers: dict[str, str]

    @property
    def url(self) -> str:
        return self.server.base_url

    @property
    def service(self) -> InferenceService:
        return self.server.service

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=self.headers)

    def post(self, path: str, body: Any) -> Any:
        response = httpx.post(f"{self.url}/v1/{path}", json=body, headers=self.headers, timeout=60)
        assert response.status_code == 200, response.text
        return response.json()


def options(*arguments: str, **changes: Any) -> Namespace:
    """Return the options of a command line, with some changed."""
    return Namespace(**vars(parse_options(arguments)) | changes)


@contextmanager
def run_server(given: Namespace, key: str | None = None) -> Iterator[Running]:
    """Run a server in a thread."""
    server = InferenceServer(load_service(given), given.host, given.port, key)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Running(server, {"authorization": f"Bearer {key}"} if key else {})
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


def wait_until(condition: Callable[[], object], seconds: float = 10) -> None:
    """Wait for a condition, and fail if it does not become true in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


@contextmanager
def trained_server(folders: pytest.TempPathFactory) -> Iterator[Running]:
    """Run a server of the run `trained`."""
    export = make_run(folders.mktemp("runs") / "trained")
    with run_server(options(model=str(export), port=0, max_concurrency=16)) as running:
        yield running


@contextmanager
def start(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `python serve.py` in a process of its own; gives the process and its address."""
    command, pipe = [sys.executable, str(ROOT / "serve.py"), "--port", "0", *arguments], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=os.environ | environment) as process:
        try:
            assert process.stdout is not None
            yield process, next(line for line in process.stdout if "http://" in line).split()[-1]
        finally:
            process.terminate()

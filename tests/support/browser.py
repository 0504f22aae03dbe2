"""What the tests of the page share: a small run, a server process, and options of the browser."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch
from transformers import AutoModelForCausalLM

from dpo.models.loading import resolve_model_path
from dpo.models.origin import ORIGIN_FILE, PolicyOrigin

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
QUIET = [  # without these, Chromium contacts servers of its own
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
    *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []),
]
HELD_OUT = (
    {
        "prompt": "\n\nHuman: What is the capital of Italy?\n\nAssistant:",
        "chosen": " It is Rome.",
        "rejected": " I do not care.",
    },
    {
        "prompt": "\n\nHuman: Hello!\n\nAssistant: Good morning.\n\nHuman: What comes after Monday?\n\nAssistant:",
        "chosen": " Tuesday comes after Monday.",
        "rejected": " That depends on many things.",
    },
)
STEPS = [{"step": step, "train/loss": 0.7 - step / 100, "train/rewards/margins": step / 10} for step in (1, 2, 3)] + [
    {"step": 3, "val/loss": 0.65, "val/rewards/chosen": 0.125, "val/rewards/rejected": -0.25}
]
RESULTS = (("step", "training loss", "validation loss"), ("3", "0.67", "0.65"))
VALUES = {"val/loss": 0.65, "val/rewards/margins": 0.375}
BETA = 0.25


def make_run(folder: Path) -> Path:
    """Write a run whose policy is the shipped model and whose reference is that model with noise; return its export."""
    shipped, export, reference = resolve_model_path("quickstart"), folder / "export", folder / "reference"
    shutil.copytree(shipped, export)
    shutil.copytree(shipped, reference)
    model = AutoModelForCausalLM.from_pretrained(shipped)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=noise)
    model.save_pretrained(reference)
    origin = PolicyOrigin(str(reference), str(reference), beta=BETA)
    (export / ORIGIN_FILE).write_text(json.dumps(asdict(origin)))
    config = f"model:\n  loss:\n    beta: {BETA}\n"
    (export / "train_config.yaml").write_text(config)
    (folder / "config.yaml").write_text(config)
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HELD_OUT))
    (folder / "results.json").write_text(json.dumps(VALUES))
    with (folder / "results.csv").open("w", newline="") as file:
        csv.writer(file).writerows(RESULTS)
    with (folder / "metrics.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(name for row in STEPS for name in row)))
        table.writeheader()
        table.writerows(STEPS)
    return export


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """Run a server in a process of its own; gives its address."""
    port = _free_port()
    command = [sys.executable, "serve.py", "--device", "cpu", "--port", str(port), *arguments]
    address = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            _await_ready(process, f"{address}/ready")
            yield address
        finally:
            process.terminate()
            process.communicate(timeout=30)


def _await_ready(process: subprocess.Popen[str], url: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended: {process.communicate()[1]}")
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise RuntimeError(f"{url} was not ready within {seconds} s")


def post(address: str, path: str, body: dict[str, Any]) -> Any:
    """Return what the server answers to a program."""
    request = Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as reply:
        return json.load(reply)


def canned(*pieces: str, finish: str = "stop", done: bool = True) -> str:
    """Return a stream with a given answer, which no model could be made to give."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    events = [json.dumps(chunk) for chunk in chunks] + ["[DONE]"] * done
    return "".join(f"data: {event}\n\n" for event in events)

"""What the tests of the page share: a small run, a server process that serves it, and a browser that looks at it."""

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
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch
import yaml
from transformers import AutoModelForCausalLM

from dpo.models.loading import resolve_model_path

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
QUIET = [  # of itself, a browser speaks with its maker
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


def make_run(folder: Path) -> tuple[Path, Path]:
    """A run whose policy is the shipped model, trained against that model with noise on its weights: both folders."""
    shipped, export, reference = resolve_model_path("quickstart"), folder / "export", folder / "reference"
    shutil.copytree(shipped, export)
    shutil.copytree(shipped, reference)
    model = AutoModelForCausalLM.from_pretrained(shipped)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=noise)
    model.save_pretrained(reference)
    loss = {"class_path": "dpo.losses.DPO", "init_args": {"beta": BETA}}
    model_config = {"class_path": "dpo.training.dpo.DPO", "init_args": {"policy": str(reference), "loss": loss}}
    config = yaml.safe_dump({"model": model_config})
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
    return export, reference


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(*words: str) -> Iterator[str]:
    """Address of a server of its own."""
    port = _free_port()
    command = [sys.executable, "serve.py", "--device", "cpu", "--port", str(port), *words]
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
    """What the server says to a program."""
    request = Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as reply:
        return json.load(reply)


def canned(*pieces: str, finish: str = "stop", done: bool = True) -> str:
    """A stream that says what no model would say when asked to."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    events = [json.dumps(chunk) for chunk in chunks] + ["[DONE]"] * done
    return "".join(f"data: {event}\n\n" for event in events)

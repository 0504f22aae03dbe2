"""Starts `tests.support.sharded_training` in several processes that communicate by gloo."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 280  # seconds


def run_in_processes(count: int, cases: list[dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """Train every case in as many processes; return what came of it by the names of the cases."""
    file = folder / f"cases-{count}-{cases[0]['name']}.json"
    file.write_text(json.dumps(cases, default=str))
    command = [sys.executable, "-m", "tests.support.sharded_training", str(file), str(folder)]
    # peft writes the names of layers in the order of a set of strings, which depends on the seed of hashes.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DPO_CACHE": str(folder / "cache"), "PYTHONHASHSEED": "0"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "TORCHELASTIC_RUN_ID": "test"}
    processes = []
    for rank in range(count):
        own = {**torchrun, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
        with (folder / f"{file.stem}-{rank}.log").open("w") as log:
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment | ({name: str(value) for name, value in own.items()} if count > 1 else {}),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    end = time.monotonic() + TIMEOUT
    while any(process.poll() is None for process in processes):
        if time.monotonic() > end or any(process.poll() for process in processes):
            for process in processes:
                process.kill()
        time.sleep(0.1)
    logs = "\n".join((folder / f"{file.stem}-{rank}.log").read_text()[-1500:] for rank in range(count))
    assert not any(process.returncode for process in processes), logs
    return {case["name"]: torch.load(folder / f"{case['name']}.pt", weights_only=False) for case in cases}

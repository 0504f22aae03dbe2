"""Start and stop: reads the models, binds the port, ends in time.

Takes the options of `serve.py`, where they are described. Knows nothing of requests.
"""

import asyncio
import logging
import os
import socket
from argparse import Namespace
from pathlib import Path

import torch
import uvicorn
from transformers.utils.logging import disable_progress_bar

from dpo import quickstart
from dpo.data.tokenization import Encoder
from dpo.models.cpu import keep_few_kernels
from dpo.models.loading import Loader, end_ids
from dpo.models.prompt_sharing import vocabulary
from dpo.runs.export import Origin, models, origin
from dpo.serving.app import build
from dpo.serving.engine import Engine
from dpo.serving.security import HEAD_SECONDS, LOOPBACK, Guard, TimedProtocol
from dpo.serving.service import Service
from dpo.serving.tokenization import UNCUT, Text

LATEST = Path("runs/latest/export")
MOST_CONTEXT = 4096  # tokens, where --max-context does not say
STREAMS_END, ALL_ENDS = 4.0, 6  # seconds after the signal


def find(options: Namespace) -> Origin:
    """Policy and reference; a ValueError says what to type where there is no run, or nothing to compare it with."""
    if options.demo:
        return origin(str(quickstart.TRAINED / "export"), options.reference)
    if options.model is None and not LATEST.is_dir():
        raise ValueError(
            "There is no trained run yet.\n  make fit    trains the built-in example (about two minutes)\n"
            "  python serve.py --demo    serves a run of it that is shipped\n"
            "  python serve.py --model FOLDER --reference FOLDER_OR_HUB_ID    serves other models"
        )
    return origin(options.model or str(LATEST), options.reference)


def load(options: Namespace) -> Service:
    """Read both models and put them to work; a ValueError says what is missing or does not fit together."""
    slots, context = options.max_concurrency, MOST_CONTEXT if options.max_context is None else options.max_context
    if slots < 1 or context < 2 or not 0 <= options.port < 2**16:
        least = "--max-concurrency of at least 1, --max-context of at least 2 tokens"
        raise ValueError(f"Expected {least} and --port of 0 to 65535.")
    found = find(options)
    both = models(found)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    try:
        for model in both.values():
            torch.nn.Module.to(model.requires_grad_(False), device=device, dtype=getattr(torch, options.dtype))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {error}") from error
    sizes = {name: vocabulary(model) for name, model in both.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"policy and reference must share a vocabulary; their sizes are {sizes}.")
    configs = [model.config.get_text_config() for model in both.values()]
    known = min(getattr(config, "max_position_embeddings", context) for config in configs)  # some know no limit
    if options.max_context and context > known:
        raise ValueError(f"--max-context: expected at most {known} tokens, which both models know, got {context}.")
    context = min(context, known)
    text = Text(Encoder(Loader().tokenizer(found.policy), UNCUT, found.format, end_ids(found.policy)), context)
    engines = {name: Engine(model, slots, context) for name, model in both.items()}
    return Service(found, engines, text, slots)


class Server(uvicorn.Server):
    """uvicorn's server, which says where it is and lets streams end before it goes."""

    def __init__(self, service: Service, host: str, port: int, key: str | None) -> None:
        if key is None and host not in LOOPBACK:
            raise ValueError(f"--host {host} is reachable from other machines: set a key in DPO_API_KEY first.")
        config = uvicorn.Config(
            Guard(build(service), key), host, port, http=TimedProtocol, ws="none", log_level="warning",
            access_log=False, server_header=False, timeout_keep_alive=HEAD_SECONDS, timeout_graceful_shutdown=ALL_ENDS,
        )  # fmt: skip
        super().__init__(config)
        self.service = service

    @property
    def link(self) -> str:
        """Where it is, once it is there."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        if self.started:
            made = self.service.origin
            told = ("policy", made.policy), ("reference", made.reference), ("note", made.note), ("at", self.link)
            print("\n".join(f"{name:10} {value}" for name, value in told if value), flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for what is being said, which later ends with an error."""
        for engine in self.service.engines.values():
            asyncio.get_running_loop().call_later(STREAMS_END, engine.abort)
        await super().shutdown(sockets)


def serve(options: Namespace) -> None:
    """Serve until a signal; a ValueError says why it cannot start."""
    for name in ("transformers", "ContinuousBatchingLogger"):
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bar()
    keep_few_kernels()
    Server(load(options), options.host, options.port, os.environ.pop("DPO_API_KEY", None) or None).run()

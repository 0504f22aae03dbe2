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
from dpo.data.tokenization import PairEncoder
from dpo.models.cpu import limit_onednn_cache
from dpo.models.loading import ModelLoader, read_end_ids
from dpo.models.prompt_sharing import vocabulary_size
from dpo.runs.export import PolicyOrigin, load_policy_and_reference, read_origin
from dpo.serving.app import build_app
from dpo.serving.engine import GenerationEngine
from dpo.serving.security import HEAD_TIMEOUT_SECONDS, LOOPBACK_HOSTS, RequestGuard, TimedProtocol
from dpo.serving.service import InferenceService
from dpo.serving.tokenization import NO_LENGTH_LIMIT, TextCodec

LATEST_EXPORT = Path("runs/latest/export")
DEFAULT_MAX_CONTEXT = 4096  # tokens, where --max-context does not say
STREAM_GRACE_SECONDS, SHUTDOWN_SECONDS = 4.0, 6  # seconds after the signal


def find_origin(options: Namespace) -> PolicyOrigin:
    """Policy and reference; a ValueError says what to type where there is no run, or nothing to compare it with."""
    if options.demo:
        return read_origin(str(quickstart.TRAINED_RUN / "export"), options.reference)
    if options.model is None and not LATEST_EXPORT.is_dir():
        raise ValueError(
            "There is no trained run yet.\n  make fit    trains the built-in example (about two minutes)\n"
            "  python serve.py --demo    serves a run of it that is shipped\n"
            "  python serve.py --model FOLDER --reference FOLDER_OR_HUB_ID    serves other models"
        )
    return read_origin(options.model or str(LATEST_EXPORT), options.reference)


def load_service(options: Namespace) -> InferenceService:
    """Read both models and put them to work; a ValueError says what is missing or does not fit together."""
    slots, context = (
        options.max_concurrency,
        DEFAULT_MAX_CONTEXT if options.max_context is None else options.max_context,
    )
    if slots < 1 or context < 2 or not 0 <= options.port < 2**16:
        least = "--max-concurrency of at least 1, --max-context of at least 2 tokens"
        raise ValueError(f"Expected {least} and --port of 0 to 65535.")
    found = find_origin(options)
    both = load_policy_and_reference(found)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    try:
        for model in both.values():
            torch.nn.Module.to(model.requires_grad_(False), device=device, dtype=getattr(torch, options.dtype))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {error}") from error
    sizes = {name: vocabulary_size(model) for name, model in both.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"policy and reference must share a vocabulary; their sizes are {sizes}.")
    configs = [model.config.get_text_config() for model in both.values()]
    known = min(getattr(config, "max_position_embeddings", context) for config in configs)  # some know no limit
    if options.max_context and context > known:
        raise ValueError(f"--max-context: expected at most {known} tokens, which both models know, got {context}.")
    context = min(context, known)
    text = TextCodec(
        PairEncoder(
            ModelLoader().load_tokenizer(found.policy_path),
            NO_LENGTH_LIMIT,
            found.format,
            read_end_ids(found.policy_path),
        ),
        context,
    )
    engines = {name: GenerationEngine(model, slots, context) for name, model in both.items()}
    return InferenceService(found, engines, text, slots)


class InferenceServer(uvicorn.Server):
    """uvicorn's server, which says where it is and lets streams end before it goes."""

    def __init__(self, service: InferenceService, host: str, port: int, key: str | None) -> None:
        if key is None and host not in LOOPBACK_HOSTS:
            raise ValueError(f"--host {host} is reachable from other machines: set a key in DPO_API_KEY first.")
        config = uvicorn.Config(
            RequestGuard(build_app(service), key), host, port, http=TimedProtocol, ws="none", log_level="warning",
            access_log=False, server_header=False, timeout_keep_alive=HEAD_TIMEOUT_SECONDS, timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )  # fmt: skip
        super().__init__(config)
        self.service = service

    @property
    def base_url(self) -> str:
        """Where it is, once it is there."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        if self.started:
            made = self.service.origin
            told = (
                ("policy", made.policy_path),
                ("reference", made.reference_path),
                ("note", made.reference_note),
                ("at", self.base_url),
            )
            print("\n".join(f"{name:10} {value}" for name, value in told if value), flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for what is being said, which later ends with an error."""
        for engine in self.service.engines.values():
            asyncio.get_running_loop().call_later(STREAM_GRACE_SECONDS, engine.abort_requests)
        await super().shutdown(sockets)


def serve(options: Namespace) -> None:
    """Serve until a signal; a ValueError says why it cannot start."""
    for name in ("transformers", "ContinuousBatchingLogger"):
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bar()
    limit_onednn_cache()
    InferenceServer(
        load_service(options), options.host, options.port, os.environ.pop("DPO_API_KEY", None) or None
    ).run()

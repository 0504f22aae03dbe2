"""Load the models, listen on the port, and shut down in time.

The options come from `dpo.cli.serve`, which describes them.
"""

import asyncio
import logging
import os
import socket
from argparse import Namespace
from pathlib import Path

import torch
import uvicorn
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from dpo.data.tokenization import PairEncoder
from dpo.models.cpu import limit_onednn_cache
from dpo.models.loading import ModelLoader, context_length, read_end_ids
from dpo.models.origin import ServedPolicy, find_policy, load_policy_and_reference
from dpo.models.prompt_sharing import vocabulary_size
from dpo.serving.app import build_app
from dpo.serving.engine import GenerationEngine, default_cache_bytes
from dpo.serving.security import HEAD_TIMEOUT_SECONDS, LOOPBACK_HOSTS, RequestGuard, TimedProtocol
from dpo.serving.service import InferenceService
from dpo.serving.tokenization import NO_LENGTH_LIMIT, TextCodec

LATEST_EXPORT = Path("runs/latest/export")
DEFAULT_MAX_CONTEXT = 4096  # tokens
STREAM_GRACE_SECONDS = 4.0  # from the signal until running streams are ended with an error
SHUTDOWN_SECONDS = 6  # from the signal until remaining connections are closed


def find_served_policy(options: Namespace) -> ServedPolicy:
    """Return which policy to serve and which reference to compare it with.

    Raises:
        ValueError: There is no run yet, or no known reference; the message says what to type.
    """
    if options.model is None and not LATEST_EXPORT.is_dir():
        raise ValueError(
            "There is no trained run yet.\n  make fit    trains the built-in example (about two minutes)\n"
            "  python serve.py --demo    serves the trained example that is shipped\n"
            "  python serve.py --model FOLDER --reference FOLDER_OR_HUB_ID    serves other models"
        )
    return find_policy(options.model or str(LATEST_EXPORT), options.reference)


def load_service(options: Namespace) -> InferenceService:
    """Load policy and reference, and build the service around them.

    Raises:
        ValueError: An option is out of range, a model is missing, or the two models do not fit together.
    """
    slots = options.max_concurrency
    max_context = DEFAULT_MAX_CONTEXT if options.max_context is None else options.max_context
    if slots < 1 or max_context < 2 or not 0 <= options.port < 2**16:
        raise ValueError(
            "Expected --max-concurrency of at least 1, --max-context of at least 2 tokens and --port of 0 to 65535, "
            f"got {slots}, {max_context} and {options.port}."
        )
    served = find_served_policy(options)
    models = load_policy_and_reference(served)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _place(models, device, options.dtype or default_dtype(device))
    sizes = {name: vocabulary_size(model) for name, model in models.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"Policy and reference must share a vocabulary; their sizes are {sizes}.")
    limit = min(context_length(model) or max_context for model in models.values())
    if options.max_context and max_context > limit:
        raise ValueError(f"--max-context: expected at most {limit} tokens, the models' limit, got {max_context}.")
    context = min(max_context, limit)
    tokenizer = ModelLoader().load_tokenizer(served.policy_path)
    encoder = PairEncoder(tokenizer, NO_LENGTH_LIMIT, served.format, read_end_ids(served.policy_path))
    engines = _make_engines(models, slots, context, options.cache_gib)
    return InferenceService(served, engines, TextCodec(encoder, context), slots)


def default_dtype(device: str) -> str:
    """Return the data type for a device: CUDA computes bfloat16 several times as fast as float32, a CPU does not."""
    return "bfloat16" if device.startswith("cuda") else "float32"


def _place(models: dict[str, PreTrainedModel], device: str, dtype: str) -> None:
    """Move frozen models to a device and a data type."""
    try:
        for model in models.values():
            torch.nn.Module.to(model.requires_grad_(False), device=device, dtype=getattr(torch, dtype))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {error}") from error


def _make_engines(
    models: dict[str, PreTrainedModel], slots: int, context: int, cache_gib: float | None
) -> dict[str, GenerationEngine]:
    sizes = {name: default_cache_bytes(model) for name, model in models.items()}
    if cache_gib is not None:
        sizes = dict.fromkeys(models, int(max(cache_gib, 0) * 2**30))
    engines = {name: GenerationEngine(model, slots, context, sizes[name]) for name, model in models.items()}
    need = max(engine.cache_bytes for engine in engines.values())
    if cache_gib is not None and need > cache_gib * 2**30:
        raise ValueError(
            f"--cache-gib: expected at least {need / 2**30:.2f}, room for two contexts of {context:,} tokens, got "
            f"{cache_gib:g}: give more, or a smaller --max-context."
        )
    return engines


class InferenceServer(uvicorn.Server):
    """A uvicorn server that prints its address, and gives running streams time to end before it stops.

    Args:
        service: The models to serve.
        host: Address to listen on.
        port: Port to listen on; 0 for any free one.
        key: The key that clients must send, or None.

    Raises:
        ValueError: Other machines can reach `host`, and there is no key.
    """

    def __init__(self, service: InferenceService, host: str, port: int, key: str | None) -> None:
        if key is None and host not in LOOPBACK_HOSTS:
            raise ValueError(f"--host {host} is reachable from other machines: set a key in DPO_API_KEY first.")
        config = uvicorn.Config(
            RequestGuard(build_app(service), key), host, port, http=TimedProtocol, ws="none", log_level="warning",
            access_log=False, server_header=False, timeout_keep_alive=HEAD_TIMEOUT_SECONDS,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )  # fmt: skip
        super().__init__(config)
        self.service = service

    @property
    def base_url(self) -> str:
        """The address of the running server, with the port that it got."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and print what is served at which address."""
        await super().startup(sockets)
        if self.started:
            served = self.service.served
            lines = {
                "policy": served.policy_path,
                "reference": served.reference_path,
                "note": served.reference_note,
                "cache": self._describe_cache(),
                "at": self.base_url,
            }
            print("\n".join(f"{name:10} {value}" for name, value in lines.items() if value), flush=True)

    def _describe_cache(self) -> str:
        engine = min(self.service.engines.values(), key=lambda engine: engine.cache_tokens)
        gib = engine.cache_bytes / 2**30
        return f"{engine.cache_tokens:,} tokens, {gib:.2f} GiB for each model (--cache-gib changes it)"

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for running streams, and end those that take longer than `STREAM_GRACE_SECONDS` with an error."""
        for engine in self.service.engines.values():
            asyncio.get_running_loop().call_later(STREAM_GRACE_SECONDS, engine.abort_requests)
        await super().shutdown(sockets)


def serve(options: Namespace) -> None:
    """Serve until a signal ends the process.

    Raises:
        ValueError: The server cannot start with these options; the message says what to change.
    """
    for name in ("transformers", "ContinuousBatchingLogger"):
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bar()
    limit_onednn_cache()
    key = os.environ.pop("DPO_API_KEY", None) or None
    InferenceServer(load_service(options), options.host, options.port, key).run()

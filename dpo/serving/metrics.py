"""What Prometheus is told.

Takes the engines and what passes by; gives a registry.
"""

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from functools import partial
from operator import attrgetter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dpo.serving.engine import Engine
from dpo.serving.reply import Piece, Reply


class Metrics:
    """Counters and gauges of one server."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("dpo_requests", "Answered requests.", ["route", "status"], registry=registry)
        self.tokens = Counter("dpo_tokens", "Tokens read and generated.", ["model", "kind"], registry=registry)
        self.first = Histogram("dpo_first_token_seconds", "Until the first token.", ["model"], registry=registry)
        active = Gauge("dpo_active_requests", "Waiting for tokens.", ["model"], registry=registry)
        cache = Gauge("dpo_cache_used_ratio", "Share of the cache in use.", ["model"], registry=registry)
        alive = Gauge("dpo_engine_alive", "1 while the model answers.", ["model"], registry=registry)
        for name, engine in engines.items():
            active.labels(name).set_function(partial(attrgetter("active"), engine))
            cache.labels(name).set_function(partial(attrgetter("cache_used"), engine))
            alive.labels(name).set_function(partial(attrgetter("alive"), engine))

    async def watched(self, model: str, reply: Reply, pieces: AsyncGenerator[Piece]) -> AsyncGenerator[Piece]:
        """The same pieces, counted."""
        started = time.perf_counter()
        self.tokens.labels(model, "prompt").inc(len(reply.prompt))
        try:
            async with aclosing(pieces) as parts:
                async for piece in parts:
                    if started:
                        self.first.labels(model).observe(time.perf_counter() - started)
                        started = 0.0
                    yield piece
        finally:
            self.tokens.labels(model, "completion").inc(len(reply.generated))

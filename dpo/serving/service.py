"""The two models and what surrounds them: what starts and stops, what is counted, how answers are scored.

Knows no routes.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from prometheus_client import Counter, Gauge, Histogram

from dpo.batch import Example
from dpo.export import Origin
from dpo.serving.engine import Engine
from dpo.serving.schema import Fault
from dpo.serving.scorer import Scorer
from dpo.serving.text import Text

T = TypeVar("T")
Json = dict[str, Any]
RESTART_SECONDS = 1.0

REQUESTS = Counter("dpo_requests", "Answered requests.", ["route", "status"])
TOKENS = Counter("dpo_tokens", "Tokens read and generated.", ["model", "kind"])
FIRST = Histogram("dpo_first_token_seconds", "Until the first token.", ["model"])
ACTIVE = Gauge("dpo_active_requests", "Waiting for tokens.", ["model"])
CACHE = Gauge("dpo_cache_used_ratio", "Share of the cache in use.", ["model"])
ALIVE = Gauge("dpo_engine_alive", "1 while the model answers.", ["model"])


@dataclass
class Service:
    """Everything of one server.

    Attributes:
        slots: Requests answered at a time; more are told to try again.
        admitted: Requests being answered.
    """

    origin: Origin
    engines: Mapping[str, Engine]
    scorer: Scorer
    text: Text
    slots: int
    admitted: int = 0
    tokenizing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tokenizer"))

    @asynccontextmanager
    async def lifespan(self, _: object) -> AsyncIterator[None]:
        """Start the engines, start them again when they die, stop them."""
        for engine in self.engines.values():
            engine.start()
        watch = asyncio.create_task(self._watch())
        yield
        watch.cancel()
        for engine in self.engines.values():
            engine.manager.stop(hard_stop=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(RESTART_SECONDS)
            for engine in self.engines.values():
                if not engine.alive:
                    engine.abort()
                    engine.start()

    def expect_ready(self) -> None:
        """Both models answer, or that they do not is a `Fault`."""
        if not all(engine.alive for engine in self.engines.values()):
            raise Fault(503, "a model has failed and is being started again", "unavailable")

    def measure(self) -> None:
        """Bring up to date what is not counted as it happens."""
        for name, engine in self.engines.items():
            ACTIVE.labels(name).set(len(engine.waiting))
            CACHE.labels(name).set(engine.cache_used)
            ALIVE.labels(name).set(engine.alive)

    async def tokenize(self, make: Callable[..., T], *given: Any) -> T:
        """Beside the event loop, one at a time."""
        return await asyncio.get_running_loop().run_in_executor(self.tokenizing, make, *given)

    async def score(self, examples: Sequence[Example], tokens: bool) -> list[Json]:
        """Every answer of every example: log-prob under both models and reward, in nats; each token if asked for."""
        answers = [ids for example in examples for ids in example.answers]
        told: list[Json] = []
        for ids, scores in zip(answers, await self.scorer(examples), strict=True):
            sums = {name: math.fsum(values) for name, values in scores.items()}
            reward = self.origin.beta * (sums["policy"] - sums["reference"])
            told.append({"logprob": sums, "reward": reward, "length": len(ids)})
            if tokens:
                rows = zip(self.text.pieces(ids), *scores.values(), strict=True)
                told[-1]["tokens"] = [dict(zip(("text", *scores), row, strict=True)) for row in rows]
        return told

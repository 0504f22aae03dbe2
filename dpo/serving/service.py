"""The two models and what surrounds them: what starts and stops, what is counted, how answers are scored.

Knows no routes.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from prometheus_client import Counter, Gauge, Histogram

from dpo.data.sampler import pack_rows_by_tokens
from dpo.models.batch import Batch, Example, collate
from dpo.runs.export import PolicyOrigin
from dpo.serving.engine import GenerationEngine
from dpo.serving.schema import APIError
from dpo.serving.tokenization import TextCodec

_T = TypeVar("_T")
JsonObject = dict[str, Any]
LogprobsByModel = dict[str, list[float]]  # log-prob of each token of one answer, nats, by name of the model
RESTART_DELAY_SECONDS = 1.0
MAX_SCORING_TOKENS = 4096  # of one forward; longer work is cut, and others come in between

REQUEST_COUNTER = Counter("dpo_requests", "Answered requests.", ["route", "status"])
TOKEN_COUNTER = Counter("dpo_tokens", "Tokens read and generated.", ["model", "kind"])
FIRST_TOKEN_SECONDS = Histogram("dpo_first_token_seconds", "Until the first token.", ["model"])
ACTIVE_REQUESTS = Gauge("dpo_active_requests", "Waiting for tokens.", ["model"])
CACHE_USED_RATIO = Gauge("dpo_cache_used_ratio", "Share of the cache in use.", ["model"])
ENGINE_ALIVE = Gauge("dpo_engine_alive", "1 while the model answers.", ["model"])


class InferenceService:
    """Everything of one server, which answers so many requests at a time as it has slots."""

    def __init__(
        self, origin: PolicyOrigin, engines: Mapping[str, GenerationEngine], text: TextCodec, slots: int
    ) -> None:
        self.origin, self.engines, self.codec, self.slots, self.active_requests = origin, engines, text, slots, 0
        self.tokenizer_executor, self.scorer_executor = (
            ThreadPoolExecutor(1, "tokenizer"),
            ThreadPoolExecutor(1, "scorer"),
        )

    @asynccontextmanager
    async def lifespan(self, _: object) -> AsyncIterator[None]:
        """Start the engines, start them again when they die, stop them."""
        for engine in self.engines.values():
            engine.start_batching()
        watch = asyncio.create_task(self._watch())
        yield
        watch.cancel()
        for engine in self.engines.values():
            engine.manager.stop(hard_stop=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(RESTART_DELAY_SECONDS)
            for engine in self.engines.values():
                if not engine.is_alive:
                    engine.abort_requests()
                    engine.start_batching()

    def require_ready(self) -> None:
        """Both models answer, or that they do not is a `Fault`."""
        if not all(engine.is_alive for engine in self.engines.values()):
            raise APIError(503, "a model has failed and is being started again", "unavailable")

    async def run_in_tokenizer(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Beside the event loop, one at a time."""
        return await asyncio.get_running_loop().run_in_executor(self.tokenizer_executor, function, *arguments)

    async def answer_logprobs(self, examples: Sequence[Example]) -> list[LogprobsByModel]:
        """Scores of every answer of every example, in order."""
        found: dict[int, list[LogprobsByModel]] = {}
        costs = np.array([len(example.prompt) + sum(map(len, example.answers)) for example in examples])
        for rows in pack_rows_by_tokens(costs, MAX_SCORING_TOKENS):
            batch = collate([examples[row] for row in rows])
            scores = iter(await asyncio.get_running_loop().run_in_executor(self.scorer_executor, self._score, batch))
            found |= {row: list(islice(scores, len(examples[row].answers))) for row in rows}
        return [answer for row in range(len(examples)) for answer in found[row]]

    def _score(self, batch: Batch) -> list[LogprobsByModel]:
        by_model = {name: engine.score_batch(batch) for name, engine in self.engines.items()}
        return [dict(zip(by_model, answer, strict=True)) for answer in zip(*by_model.values(), strict=True)]

    async def score_examples(self, examples: Sequence[Example], tokens: bool) -> list[JsonObject]:
        """Every answer of every example: log-prob under both models and reward, in nats; each token if asked for."""
        answers = [ids for example in examples for ids in example.answers]
        told: list[JsonObject] = []
        for ids, scores in zip(answers, await self.answer_logprobs(examples), strict=True):
            sums = {name: math.fsum(values) for name, values in scores.items()}
            reward = self.origin.beta * (sums["policy"] - sums["reference"])
            told.append({"logprob": sums, "reward": reward, "length": len(ids)})
            if tokens:
                rows = zip(self.codec.token_texts(ids), *scores.values(), strict=True)
                told[-1]["tokens"] = [dict(zip(("text", *scores), row, strict=True)) for row in rows]
        return told

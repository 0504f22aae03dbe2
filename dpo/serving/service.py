"""The two models as the routes see them: start and stop, admission, metrics, and scoring of answers."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from prometheus_client import Counter, Gauge, Histogram

from dpo.data.sampler import pack_rows_by_tokens
from dpo.models.batch import Batch, Example, collate
from dpo.models.origin import ServedPolicy
from dpo.serving.engine import GenerationEngine, TokenLogprob
from dpo.serving.schema import APIError
from dpo.serving.tokenization import TextCodec

_T = TypeVar("_T")
JsonObject = dict[str, Any]
LogprobsByModel = dict[str, list[float]]
"""By model name, the log-probability of each token of one answer, in nats."""

RESTART_DELAY_SECONDS = 1.0
MAX_SCORING_TOKENS = 4096  # per forward pass; larger requests are split, so that others get their turn in between

REQUEST_COUNTER = Counter("dpo_requests", "Answered requests.", ["route", "status"])
TOKEN_COUNTER = Counter("dpo_tokens", "Prompt tokens read and answer tokens generated.", ["model", "kind"])
FIRST_TOKEN_SECONDS = Histogram("dpo_first_token_seconds", "Seconds to the first token of an answer.", ["model"])
ACTIVE_REQUESTS = Gauge("dpo_active_requests", "Requests whose answer is being generated.", ["model"])
CACHE_USED_RATIO = Gauge("dpo_cache_used_ratio", "Fraction of the key-value cache in use.", ["model"])
ENGINE_ALIVE = Gauge("dpo_engine_alive", "1 while the model answers, else 0.", ["model"])


class InferenceService:
    """Everything that one server shares between requests.

    Args:
        served: Where policy and reference came from, and the scale of the rewards.
        engines: The two models, named `policy` and `reference`.
        codec: Converts between text and tokens.
        slots: Maximum number of requests answered at a time.

    Attributes:
        active_requests: Number of requests that hold a slot.
        generation_slots: Held by every answer that is being generated; a request for several answers waits here.
        tokenizer_executor: The one thread that tokenizes.
        scorer_executor: The one thread that scores.
    """

    def __init__(
        self, served: ServedPolicy, engines: Mapping[str, GenerationEngine], codec: TextCodec, slots: int
    ) -> None:
        self.served = served
        self.engines = engines
        self.codec = codec
        self.slots = slots
        self.active_requests = 0
        self.generation_slots = asyncio.Semaphore(slots)
        self.tokenizer_executor = ThreadPoolExecutor(1, "tokenizer")
        self.scorer_executor = ThreadPoolExecutor(1, "scorer")

    @asynccontextmanager
    async def lifespan(self, _: object) -> AsyncIterator[None]:
        """Keep the engines running while the server does."""
        for engine in self.engines.values():
            engine.start_batching()
        watchdog = asyncio.create_task(self._restart_dead_engines())
        yield
        watchdog.cancel()
        for engine in self.engines.values():
            engine.manager.stop(hard_stop=True)

    async def _restart_dead_engines(self) -> None:
        while True:
            await asyncio.sleep(RESTART_DELAY_SECONDS)
            for engine in self.engines.values():
                if not engine.is_alive:
                    engine.abort_requests()
                    engine.start_batching()

    def require_ready(self) -> None:
        """Raise an `APIError` unless both models are running."""
        if not all(engine.is_alive for engine in self.engines.values()):
            raise APIError(503, "a model has failed and is being restarted", "unavailable")

    async def run_in_tokenizer(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Run a function in the tokenizer's thread, so that it does not block the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.tokenizer_executor, function, *arguments)

    async def answer_logprobs(self, examples: Sequence[Example]) -> list[LogprobsByModel]:
        """Score every answer of every example, and return the results in that order."""
        return await self._score_in_batches(examples, self._score)

    async def prompt_logprobs(
        self, model: str, prompts: Sequence[Sequence[int]], count: int
    ) -> list[list[TokenLogprob | None]]:
        """Return the log-probabilities of all prompts' tokens with `count` alternatives; None for the first token."""
        score = partial(self.engines[model].score_alternatives, count=count)
        examples = [Example("prompt", prompt[:1], (prompt[1:],)) for prompt in prompts if len(prompt) > 1]
        scored = iter(await self._score_in_batches(examples, score))
        return [[None, *(next(scored) if len(prompt) > 1 else ())] for prompt in prompts]

    async def _score_in_batches(self, examples: Sequence[Example], score: Callable[[Batch], list[_T]]) -> list[_T]:
        results: dict[int, list[_T]] = {}
        costs = np.array([len(example.prompt) + sum(map(len, example.answers)) for example in examples])
        for rows in pack_rows_by_tokens(costs, MAX_SCORING_TOKENS):
            batch = collate([examples[row] for row in rows])
            scores = iter(await asyncio.get_running_loop().run_in_executor(self.scorer_executor, score, batch))
            results |= {row: list(islice(scores, len(examples[row].answers))) for row in rows}
        return [answer for row in range(len(examples)) for answer in results[row]]

    def _score(self, batch: Batch) -> list[LogprobsByModel]:
        by_model = {name: engine.score_batch(batch) for name, engine in self.engines.items()}
        return [dict(zip(by_model, answer, strict=True)) for answer in zip(*by_model.values(), strict=True)]

    async def score_examples(self, examples: Sequence[Example], tokens: bool) -> list[JsonObject]:
        """Score every answer of every example, in the form that the API returns.

        Args:
            examples: Prompts and answers.
            tokens: Also return the text and the log-probabilities of each token.

        Returns:
            Per answer: log-probability under both models and reward, in nats, and length in tokens.
        """
        answers = [ids for example in examples for ids in example.answers]
        scored: list[JsonObject] = []
        for ids, logprobs in zip(answers, await self.answer_logprobs(examples), strict=True):
            sums = {name: math.fsum(values) for name, values in logprobs.items()}
            reward = self.served.beta * (sums["policy"] - sums["reference"])
            scored.append({"logprob": sums, "reward": reward, "length": len(ids)})
            if tokens:
                rows = zip(self.codec.token_texts(ids), *logprobs.values(), strict=True)
                scored[-1]["tokens"] = [dict(zip(("text", *logprobs), row, strict=True)) for row in rows]
        return scored

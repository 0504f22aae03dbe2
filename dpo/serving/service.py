"""The two models and what surrounds them: who is let in, how one request is answered and scored.

Takes checked requests and token ids; gives replies. Knows no routes.
"""

import asyncio
import math
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from dpo.batch import Example
from dpo.serving.engine import Engine
from dpo.serving.metrics import Metrics
from dpo.serving.models import Origin
from dpo.serving.reply import CHAT, Form, Json, Piece, Reply
from dpo.serving.sampling import Draw
from dpo.serving.schema import Fault, Generation
from dpo.serving.scorer import Scorer, Scores
from dpo.serving.text import HUMAN, Text, Writer

T = TypeVar("T")
RESTART_SECONDS = 1.0
SHORT_BYTES = 8192  # about 5 ms of tokenising


class Service:
    """Everything of one server.

    Attributes:
        slots: Requests answered at a time; more are told to try again.
        admitted: Requests being answered.
        stopping: No more are let in.
    """

    def __init__(self, origin: Origin, engines: Mapping[str, Engine], scorer: Scorer, text: Text, slots: int) -> None:
        self.origin, self.engines, self.scorer, self.text, self.slots = origin, engines, scorer, text, slots
        self.admitted, self.stopping = 0, False
        self.encoding = ThreadPoolExecutor(1, "tokenizer")
        self.metrics = Metrics(engines)

    @asynccontextmanager
    async def lifespan(self, _: object) -> AsyncIterator[None]:
        """Start the engines, start them again when they die, stop them."""
        for engine in self.engines.values():
            engine.start()
        watch = asyncio.create_task(self._watch())
        yield
        watch.cancel()
        for engine in self.engines.values():
            await asyncio.to_thread(engine.stop)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(RESTART_SECONDS)
            for engine in self.engines.values():
                if not engine.alive:
                    engine.abort()
                    engine.start()

    def stop_soon(self, seconds: float) -> None:
        """Let nobody in; what is still being said by then ends with an error."""
        self.stopping = True
        for engine in self.engines.values():
            asyncio.get_running_loop().call_later(seconds, engine.abort)

    @property
    def ready(self) -> bool:
        """Both models answer."""
        return not self.stopping and all(engine.alive for engine in self.engines.values())

    async def admit(self) -> AsyncIterator[None]:
        """Hold a place while a request is answered.

        Raises:
            Fault: There is none.
        """
        if not self.ready:
            raise Fault(503, "the server is stopping or a model has failed", "unavailable")
        if self.admitted >= self.slots:
            raise Fault(429, f"{self.slots} requests are being answered: try again", "too_many_requests")
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1

    async def encode(self, function: Callable[[], T], size: int) -> T:
        """Tokenise: what is long beside the event loop, one at a time; a thread for each short text would cost more."""
        if size <= SHORT_BYTES:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self.encoding, function)

    def reply(self, form: Form, body: Generation, prompt: list[int]) -> tuple[Reply, AsyncGenerator[Piece]]:
        """An answer, and its pieces as they come.

        Raises:
            Fault: It asks for more tokens than there can be.
        """
        text, dialogue = self.text, form is CHAT and not self.text.encoder.chat
        limit = text.context if body.limit is None else body.limit
        if limit > text.context:
            message = f"max_tokens: expected at most {text.context}, got {limit}"
            raise Fault(400, message, "context_length_exceeded", "max_tokens")
        temperature, top_p = (1.0 if value is None else value for value in (body.temperature, body.top_p))
        draw = Draw(temperature, top_p, secrets.randbits(62) if body.seed is None else body.seed, body.top)
        writer = Writer(text, prompt, [*body.stops, *([HUMAN] if dialogue else [])], skip_space=dialogue)
        reply = Reply(form, body, self.engines[body.model], text, prompt, limit)
        return reply, self.metrics.watched(body.model, reply, reply.pieces(draw, writer))

    async def score(self, examples: Sequence[Example], tokens: bool) -> list[Json]:
        """Every answer of every example: log-prob under both models and reward, in nats; each token if asked for."""
        scores = await self.scorer(examples)
        answers = [ids for example in examples for ids in example.answers]
        return [self._described(*both, tokens) for both in zip(scores, answers, strict=True)]

    def _described(self, scores: Scores, ids: Sequence[int], tokens: bool) -> Json:
        sums = {name: math.fsum(values) for name, values in scores.items()}
        reward = self.origin.beta * (sums["policy"] - sums["reference"])
        answer: Json = {"logprob": sums, "reward": reward, "length": len(ids)}
        if tokens:
            rows = zip(self.text.pieces(ids), scores["policy"], scores["reference"], strict=True)
            answer["tokens"] = [{"text": text, "policy": ours, "reference": theirs} for text, ours, theirs in rows]
        return answer

    async def reward(self, example: Example) -> Json:
        """Of one reply."""
        return (await self.score([example], False))[0]

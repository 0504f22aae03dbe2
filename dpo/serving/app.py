"""The routes: what is asked over HTTP -> engines, scorer and the folder of the run.

Takes a `Service`; gives the application that `guard` stands in front of.
"""

import asyncio
import csv
import json
import math
import secrets
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from dpo.batch import Example
from dpo.serving.answers import CHAT, COMPLETION, Form, Json, Reply
from dpo.serving.engine import Engine, Unavailable
from dpo.serving.metrics import Metrics
from dpo.serving.models import Origin
from dpo.serving.sampling import Draw
from dpo.serving.schema import ChatRequest, CompareRequest, CompletionRequest, Fault, Generation, Question, ScoreRequest
from dpo.serving.scorer import Scorer, Scores
from dpo.serving.text import Text, Writer

PAGE = {file.name: file.read_bytes() for file in (Path(__file__).parent / "page").glob("*.*")}
RUN_FILES = ("results.csv", "metrics.csv", "results.json", "held_out.jsonl", "config.yaml")
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


class Service:
    """The two models and what surrounds them, from start to stop."""

    def __init__(self, origin: Origin, engines: dict[str, Engine], scorer: Scorer, text: Text, slots: int) -> None:
        self.origin, self.engines, self.scorer, self.text, self.slots = origin, engines, scorer, text, slots
        self.admitted, self.stopping = 0, False
        self.encoding = ThreadPoolExecutor(1, "tokenizer")
        self.metrics = Metrics(engines)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
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
            await asyncio.sleep(1)
            for engine in self.engines.values():
                if not engine.alive:
                    engine.abort()
                    engine.start()

    def stop_soon(self, seconds: float) -> None:
        """Take no more requests; what is still being said then ends with an error."""
        self.stopping = True
        for engine in self.engines.values():
            asyncio.get_running_loop().call_later(seconds, engine.abort)

    @property
    def ready(self) -> bool:
        """Every model answers."""
        return not self.stopping and all(engine.alive for engine in self.engines.values())

    async def admit(self) -> AsyncIterator[None]:
        """Hold a place while a request is answered."""
        if not self.ready:
            raise Fault(503, "the server is stopping or a model has failed", "unavailable")
        if self.admitted >= self.slots:
            raise Fault(429, f"{self.slots} requests are being answered: try again", "too_many_requests")
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1

    async def encode(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Tokenise beside the event loop, one at a time."""
        return await asyncio.get_running_loop().run_in_executor(self.encoding, function, *arguments)

    def describe(self, scores: Scores, ids: list[int], tokens: bool) -> Json:
        """One scored answer."""
        sums = {name: math.fsum(values) for name, values in scores.items()}
        reward = self.origin.beta * (sums["policy"] - sums["reference"])
        answer: Json = {"logprob": sums, "reward": reward, "length": len(ids)}
        if tokens:
            rows = zip(self.text.pieces(ids), scores["policy"], scores["reference"], strict=True)
            answer["tokens"] = [{"text": t, "policy": p, "reference": r} for t, p, r in rows]
        return answer

    async def score(self, examples: list[Example], tokens: bool) -> list[Json]:
        """Every answer of every example, described."""
        scores = await self.scorer(examples)
        answers = [list(ids) for example in examples for ids in example.answers]
        return [self.describe(s, ids, tokens) for s, ids in zip(scores, answers, strict=True)]

    async def reward(self, example: Example) -> Json:
        """Of one reply."""
        return (await self.score([example], False))[0]

    async def reply(
        self, form: Form, body: Generation, prompt: list[int], limit: int | None, top: int | None, stops: list[str]
    ) -> Response:
        """Answer a request, as a stream or whole."""
        engine = self.engines[body.model]
        if limit is not None and limit > self.text.context:
            message = f"expected at most {self.text.context} tokens, got {limit}"
            raise Fault(400, message, "context_length_exceeded", "max_tokens")
        temperature, top_p = (1.0 if value is None else value for value in (body.temperature, body.top_p))
        draw = Draw(temperature, top_p, secrets.randbits(62) if body.seed is None else body.seed, top)
        writer = Writer(self.text, prompt, stops, skip_space=form is CHAT and not self.text.encoder.chat)
        reply = Reply(form, body, engine, self.text, prompt, self.text.context if limit is None else limit)
        pieces = self.metrics.watched(body.model, reply, reply.pieces(draw, writer))
        reward = self.reward if body.reward else None
        if body.stream:
            return StreamingResponse(reply.stream(pieces, top is not None, reward), media_type="text/event-stream")
        return json_response(await reply.whole(pieces, top is not None, reward))


def json_response(body: Json, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON in ASCII: any text that a client can send can be sent back."""
    return Response(json.dumps(body), status, headers, "application/json")


def fault_response(fault: Fault) -> Response:
    """A typed error."""
    return json_response(fault.body, fault.status, {"retry-after": "1"} if fault.status in (429, 503) else None)


def explain(error: RequestValidationError) -> Fault:
    """The first thing that is wrong with a body, by the name of its field."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:])[:200]
    message = "not supported" if first["type"] == "extra_forbidden" else first["msg"]
    return Fault(400, f"{field or 'body'}: {message}", first["type"], field or None)


def build(service: Service) -> FastAPI:
    """The application."""
    quiet: Any = {"tracing": False, "metrics": False, "logs": False}
    app = FastAPI(title="dpo-lightning", docs_url=None, redoc_url=None, lifespan=service.lifespan, telemetry=quiet)
    app.add_exception_handler(Fault, lambda _, e: fault_response(e))  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, lambda _, e: fault_response(explain(e)))  # type: ignore[arg-type]
    app.add_exception_handler(
        HTTPException,
        lambda _, e: fault_response(Fault(e.status_code, str(e.detail), "http_error")),  # type: ignore[attr-defined]
    )
    app.add_exception_handler(Unavailable, lambda _, e: fault_response(Fault(503, str(e), "unavailable")))
    app.add_exception_handler(Exception, lambda _, e: fault_response(Fault(500, "internal error", "internal_error")))
    _add_own(app, service)
    _add_openai(app, service)
    _add_page(app, service)
    return app


def _add_openai(app: FastAPI, service: Service) -> None:
    admitted, text = [Depends(service.admit)], service.text

    def known(model: str) -> None:
        if model not in service.engines:
            raise Fault(404, "expected the model 'policy' or 'reference'", "model_not_found", "model")

    @app.get("/v1/models")
    async def models() -> Json:
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": "local"} for name in service.engines]
        return {"object": "list", "data": listed}

    @app.post("/v1/chat/completions", dependencies=admitted)
    async def chat(body: ChatRequest) -> Response:
        known(body.model)
        prompt = await service.encode(lambda: text.prompt(text.history(None, body.messages)))
        limit = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        top = (body.top_logprobs or 0) if body.logprobs else None
        return await service.reply(CHAT, body, prompt, limit, top, body.stops + text.stops)

    @app.post("/v1/completions", dependencies=admitted)
    async def completions(body: CompletionRequest) -> Response:
        known(body.model)
        prompt = await service.encode(text.raw, body.prompt)
        return await service.reply(COMPLETION, body, prompt, body.max_tokens or 16, body.logprobs, body.stops)


def _add_own(app: FastAPI, service: Service) -> None:
    admitted, text = [Depends(service.admit)], service.text

    def history(question: Question) -> Any:
        return text.history(question.prompt, question.messages)

    @app.post("/v1/score", dependencies=admitted)
    async def score(body: ScoreRequest) -> Json:
        examples = await service.encode(
            lambda: [text.single(history(body), answer, f"answers.{i}") for i, answer in enumerate(body.answers)]
        )
        answers = await service.score(examples, body.tokens)
        return {"object": "score", "beta": service.origin.beta, "answers": answers}

    @app.post("/v1/compare", dependencies=admitted)
    async def compare(body: CompareRequest) -> Json:
        examples = await service.encode(
            lambda: [text.pair(history(p), p.chosen, p.rejected, f"pairs.{i}") for i, p in enumerate(body.pairs)]
        )
        answers = await service.score(examples, body.tokens)
        pairs = [_compared(*both) for both in zip(answers[::2], answers[1::2], strict=True)]
        return {"object": "compare", "beta": service.origin.beta, "pairs": pairs}

    @app.get("/v1/run")
    async def run() -> Json:
        return await asyncio.to_thread(_run, service.origin)

    @app.get("/health")
    async def health() -> Json:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        return json_response({"ready": service.ready}, 200 if service.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI, service: Service) -> None:
    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
        policy += "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        page = PAGE["index.html"].replace(b"__NONCE__", nonce.encode())
        return Response(page, headers={"content-security-policy": policy}, media_type="text/html")

    @app.get("/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in PAGE or name == "index.html":
            raise Fault(404, "no such page", "not_found")
        return Response(PAGE[name], media_type=KINDS[name.rsplit(".", 1)[-1]])


def _compared(chosen: Json, rejected: Json) -> Json:
    margin = chosen["reward"] - rejected["reward"]
    probability = 1 / (1 + math.exp(-margin)) if margin > -700 else 0.0
    preferred = "chosen" if margin > 0 else "rejected"
    verdict = {"margin": margin, "probability": probability, "preferred": preferred}
    return verdict | {"chosen": chosen, "rejected": rejected}


def _run(origin: Origin) -> Json:
    """What the run left behind, as far as it is there."""
    if origin.run is None:
        nothing = {"results": {"header": [], "rows": []}, "metrics": [], "values": {}, "held_out": [], "config": ""}
        return {"name": Path(origin.policy).name, **nothing}
    folder = origin.run.folder
    texts = {name: file.read_text() if (file := folder / name).is_file() else "" for name in RUN_FILES}
    header, *rows = csv.reader(texts["results.csv"].splitlines() or [""])
    metrics = [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(texts["metrics.csv"].splitlines())]
    return {
        "name": folder.name,
        "results": {"header": header, "rows": rows},
        "metrics": metrics[:: -(-len(metrics) // 500) or 1],
        "values": {k: _number(v) for k, v in json.loads(texts["results.json"] or "{}").items()},
        "held_out": [json.loads(line) for line in texts["held_out.jsonl"].splitlines()],
        "config": texts["config.yaml"],
    }


def _number(value: Any) -> float | None:
    """A finite number, or null."""
    number = float(value or "nan")
    return number if math.isfinite(number) else None

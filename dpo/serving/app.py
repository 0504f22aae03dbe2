"""The routes: HTTP in, HTTP out.

Takes a `Service`; gives the application that `guard` stands in front of. What goes wrong is told in OpenAI's form.
"""

import asyncio
import math
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from dpo.runs import results
from dpo.serving.reply import Reply
from dpo.serving.schema import ChatRequest, CompareRequest, CompletionRequest, Fault, ScoreRequest
from dpo.serving.service import ACTIVE, ALIVE, CACHE, Json, Service

PAGE = {file.name: file.read_bytes() for file in (Path(__file__).parent / "page").glob("*.*")}
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
CSP = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def _service(request: Request) -> Service:  # async: FastAPI would run it in a thread
    return request.app.state.service  # type: ignore[no-any-return]


Served = Annotated[Service, Depends(_service)]


async def _admitted(service: Served) -> AsyncIterator[Service]:
    """Hold one of the slots while a request is answered."""
    service.expect_ready()
    if service.admitted >= service.slots:
        raise Fault(429, f"{service.slots} requests are being answered: try again", "too_many_requests")
    service.admitted += 1
    try:
        yield service
    finally:
        service.admitted -= 1


Admitted = Annotated[Service, Depends(_admitted)]
ERRORS: dict[int | str, Json] = {kind: {"description": "What is wrong, as OpenAI tells it"} for kind in ("4XX", "5XX")}
router = APIRouter(responses=ERRORS)


@router.post("/v1/chat/completions")
async def chat(service: Admitted, body: ChatRequest) -> Response:
    """Answer messages."""
    prompt = await service.tokenize(service.text.prompt, None, body.messages)
    limit = body.max_completion_tokens or body.max_tokens
    return await _answer(Reply(service, body, prompt, limit, (body.top_logprobs or 0) if body.logprobs else None))


@router.post("/v1/completions")
async def completions(service: Admitted, body: CompletionRequest) -> Response:
    """Go on with a text; OpenAI's default is 16 tokens."""
    prompt = await service.tokenize(service.text.raw, body.prompt)
    return await _answer(Reply(service, body, prompt, body.max_tokens or 16, body.logprobs))


async def _answer(reply: Reply) -> Response:
    if reply.body.stream:
        return StreamingResponse(reply.stream(), media_type="text/event-stream")
    return JSONResponse(await reply.whole())


@router.post("/v1/score")
async def score(service: Admitted, body: ScoreRequest) -> Json:
    """The log-prob of answers under both models, and their rewards."""
    examples = await service.tokenize(lambda: [service.text.example(body, answer) for answer in body.answers])
    answers = await service.score(examples, body.tokens)
    return {"object": "score", "beta": service.origin.beta, "answers": answers}


@router.post("/v1/compare")
async def compare(service: Admitted, body: CompareRequest) -> Json:
    """Which of two answers the policy prefers, and how surely."""
    example = service.text.example
    examples = await service.tokenize(lambda: [example(pair, pair.chosen, pair.rejected) for pair in body.pairs])
    answers = await service.score(examples, body.tokens)
    pairs = [_compared(*both) for both in zip(answers[::2], answers[1::2], strict=True)]
    return {"object": "compare", "beta": service.origin.beta, "pairs": pairs}


def _compared(chosen: Json, rejected: Json) -> Json:
    margin = chosen["reward"] - rejected["reward"]
    probability = math.exp(min(margin, 0.0)) / (1 + math.exp(-abs(margin)))  # logistic; small ones keep their digits
    preferred = None if margin == 0 else "chosen" if margin > 0 else "rejected"
    verdict = {"margin": margin, "probability": probability, "preferred": preferred}
    return verdict | {"chosen": chosen, "rejected": rejected}


@router.get("/v1/models")
async def models(service: Served) -> Json:
    """Both models."""
    listed = [{"id": name, "object": "model", "created": 0, "owned_by": "local"} for name in service.engines]
    return {"object": "list", "data": listed}


@router.get("/v1/run")
async def run(service: Served) -> Json:
    """The models, and what the training run left behind."""
    made = service.origin
    left = await asyncio.to_thread(results.left, made.run)
    return left | {"policy": made.policy, "reference": made.reference, "note": made.note}


@router.get("/health")
async def health() -> Json:
    """The process answers."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(service: Served) -> Json:
    """Both models answer."""
    service.expect_ready()
    return {"ready": True}


@router.get("/metrics")
async def metrics(service: Served) -> Response:
    """For Prometheus."""
    for name, engine in service.engines.items():
        ACTIVE.labels(name).set(len(engine.waiting))
        CACHE.labels(name).set(engine.cache_used)
        ALIVE.labels(name).set(engine.alive)
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@router.get("/", include_in_schema=False)
@router.get("/{name}", include_in_schema=False)
async def page(name: str = "index.html") -> Response:
    """A file of the page; there are no paths. Only what carries the nonce of this reply may run or style it."""
    if name not in PAGE:
        raise Fault(404, "no such page", "not_found")
    nonce = secrets.token_urlsafe(16)
    content, kind = PAGE[name].replace(b"__NONCE__", nonce.encode()), KINDS[name.rsplit(".", 1)[-1]]
    return Response(content, headers={"content-security-policy": CSP.format(nonce)}, media_type=kind)


def refusal(error: Exception) -> Response:
    """What the client is told of an error; of one that is ours, nothing but that."""
    match error:
        case Fault():
            fault = error
        case HTTPException():
            fault = Fault(error.status_code, error.detail, "http_error")
        case RequestValidationError():
            first = error.errors()[0]
            place = () if first["type"] == "json_invalid" else first["loc"][1:]
            field = ".".join(map(str, place))[:200].encode("ascii", "backslashreplace").decode()
            said = "not supported" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
            fault = Fault(400, f"{field or 'body'}: {said}", first["type"], field or None)
        case _:
            fault = Fault(500, "internal error", "internal_error")
    return JSONResponse(fault.body, fault.status_code, fault.headers)


def build(service: Service) -> FastAPI:
    """The application."""
    app = FastAPI(title="dpo-lightning", lifespan=service.lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    for kind in (HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, lambda _, error: refusal(error))
    app.include_router(router)
    return app

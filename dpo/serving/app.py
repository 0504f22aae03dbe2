"""The routes: HTTP in, HTTP out.

Takes a `Service`; gives the application that `guard` stands in front of. What goes wrong is told in OpenAI's form.
"""

import asyncio
import json
import math
import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from dpo.serving.engine import Unavailable
from dpo.serving.models import run_report
from dpo.serving.reply import CHAT, COMPLETION, Form, Json
from dpo.serving.schema import ChatRequest, CompareRequest, CompletionRequest, Fault, Generation, ScoreRequest
from dpo.serving.service import Service

PAGE = {file.name: file.read_bytes() for file in (Path(__file__).parent / "page").glob("*.*")}
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def _service(request: Request) -> Service:
    return request.app.state.service  # type: ignore[no-any-return]


def _size(request: Request) -> int:
    return request.scope["body_bytes"]  # type: ignore[no-any-return]


Served = Annotated[Service, Depends(_service)]
Size = Annotated[int, Depends(_size)]


async def _admitted(service: Served) -> AsyncIterator[None]:
    async for _ in service.admit():
        yield


router = APIRouter()
work = APIRouter(prefix="/v1", dependencies=[Depends(_admitted)])


@router.get("/v1/models")
async def models(service: Served) -> Json:
    """Both models."""
    listed = [{"id": name, "object": "model", "created": 0, "owned_by": "local"} for name in service.engines]
    return {"object": "list", "data": listed}


@work.post("/chat/completions")
async def chat(service: Served, size: Size, body: ChatRequest) -> Response:
    """Answer messages."""
    text = service.text
    return await _answer(service, CHAT, body, lambda: text.prompt(text.history(None, body.messages)), size)


@work.post("/completions")
async def completions(service: Served, size: Size, body: CompletionRequest) -> Response:
    """Go on with a text."""
    return await _answer(service, COMPLETION, body, lambda: service.text.raw(body.prompt), size)


async def _answer(
    service: Service, form: Form, body: Generation, tokenise: Callable[[], list[int]], size: int
) -> Response:
    if body.model not in service.engines:
        raise Fault(404, "expected the model 'policy' or 'reference'", "model_not_found", "model")
    reply, pieces = service.reply(form, body, await service.encode(tokenise, size))
    reward = service.reward if body.reward else None
    if body.stream:
        return StreamingResponse(reply.stream(pieces, reward), media_type="text/event-stream")
    return json_response(await reply.whole(pieces, reward))


@work.post("/score")
async def score(service: Served, size: Size, body: ScoreRequest) -> Json:
    """The log-prob of answers under both models, and their rewards."""
    text = service.text
    answers = [(answer, f"answers.{i}") for i, answer in enumerate(body.answers)]
    examples = await service.encode(
        lambda: [text.single(text.history(body.prompt, body.messages), *answer) for answer in answers], size
    )
    return {"object": "score", "beta": service.origin.beta, "answers": await service.score(examples, body.tokens)}


@work.post("/compare")
async def compare(service: Served, size: Size, body: CompareRequest) -> Json:
    """Which of two answers the policy prefers, and how surely."""
    text, pairs = service.text, [(pair, f"pairs.{i}") for i, pair in enumerate(body.pairs)]
    examples = await service.encode(
        lambda: [text.pair(text.history(p.prompt, p.messages), p.chosen, p.rejected, name) for p, name in pairs], size
    )
    answers = await service.score(examples, body.tokens)
    compared = [_compared(*both) for both in zip(answers[::2], answers[1::2], strict=True)]
    return {"object": "compare", "beta": service.origin.beta, "pairs": compared}


def _compared(chosen: Json, rejected: Json) -> Json:
    margin = chosen["reward"] - rejected["reward"]
    probability = 1 / (1 + math.exp(-margin)) if margin > -700 else 0.0  # beyond, exp overflows
    preferred = "chosen" if margin > 0 else "rejected"
    verdict = {"margin": margin, "probability": probability, "preferred": preferred}
    return verdict | {"chosen": chosen, "rejected": rejected}


@router.get("/v1/run")
async def run(service: Served) -> Json:
    """What the training run left behind."""
    return await asyncio.to_thread(run_report, service.origin)


@router.get("/health")
async def health() -> Json:
    """The process answers."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(service: Served) -> Response:
    """Both models answer."""
    return json_response({"ready": service.ready}, 200 if service.ready else 503)


@router.get("/metrics")
async def metrics(service: Served) -> Response:
    """For Prometheus."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/", include_in_schema=False)
async def index() -> Response:
    """The page; only what carries this reply's nonce may run or style it."""
    nonce = secrets.token_urlsafe(16)
    policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
    policy += "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    page = PAGE["index.html"].replace(b"__NONCE__", nonce.encode())
    return Response(page, headers={"content-security-policy": policy}, media_type="text/html")


@router.get("/{name}", include_in_schema=False)
async def file(name: str) -> Response:
    """A file of the page; there are no others, and no paths."""
    if name not in PAGE or name == "index.html":
        raise Fault(404, "no such page", "not_found")
    return Response(PAGE[name], media_type=KINDS[name.rsplit(".", 1)[-1]])


def json_response(body: Json, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON in ASCII: any text that a client can send can be sent back."""
    return Response(json.dumps(body), status, headers, "application/json")


def fault_response(fault: Fault) -> Response:
    """A typed error."""
    return json_response(fault.body, fault.status, {"retry-after": "1"} if fault.status in (429, 503) else None)


def _fault(error: Any) -> Fault:
    """What the client is told of an error; of one that is ours, nothing but that."""
    match error:
        case Fault():
            return error
        case Unavailable():
            return Fault(503, str(error), "unavailable")
        case HTTPException():
            return Fault(error.status_code, str(error.detail), "http_error")
        case RequestValidationError():
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"][1:])[:200]
            message = "not supported" if first["type"] == "extra_forbidden" else first["msg"]
            return Fault(400, f"{field or 'body'}: {message}", first["type"], field or None)
    return Fault(500, "internal error", "internal_error")


def build(service: Service) -> FastAPI:
    """The application."""
    quiet: Any = {"tracing": False, "metrics": False, "logs": False}
    app = FastAPI(title="dpo-lightning", docs_url=None, redoc_url=None, lifespan=service.lifespan, telemetry=quiet)
    app.state.service = service
    for kind in (Fault, Unavailable, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, lambda _, error: fault_response(_fault(error)))
    app.include_router(work)
    app.include_router(router)
    return app

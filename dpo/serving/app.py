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
from dpo.serving.reply import CompletionReply
from dpo.serving.schema import APIError, ChatRequest, CompareRequest, CompletionRequest, ScoreRequest
from dpo.serving.service import ACTIVE_REQUESTS, CACHE_USED_RATIO, ENGINE_ALIVE, InferenceService, JsonObject

PAGE_FILES = {file.name: file.read_bytes() for file in (Path(__file__).parent / "page").glob("*.*")}
CONTENT_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
PAGE_CSP = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def _service(request: Request) -> InferenceService:  # async: FastAPI would run it in a thread
    return request.app.state.service  # type: ignore[no-any-return]


ServiceDependency = Annotated[InferenceService, Depends(_service)]


async def _admitted(service: ServiceDependency) -> AsyncIterator[InferenceService]:
    """Hold one of the slots while a request is answered."""
    service.require_ready()
    if service.active_requests >= service.slots:
        raise APIError(429, f"{service.slots} requests are being answered: try again", "too_many_requests")
    service.active_requests += 1
    try:
        yield service
    finally:
        service.active_requests -= 1


AdmittedService = Annotated[InferenceService, Depends(_admitted)]
ERROR_RESPONSES: dict[int | str, JsonObject] = {
    kind: {"description": "What is wrong, as OpenAI tells it"} for kind in ("4XX", "5XX")
}
router = APIRouter(responses=ERROR_RESPONSES)


@router.post("/v1/chat/completions")
async def post_chat_completion(service: AdmittedService, body: ChatRequest) -> Response:
    """Answer messages."""
    prompt = await service.run_in_tokenizer(service.codec.encode_prompt, None, body.messages)
    limit = body.max_completion_tokens or body.max_tokens
    return await _answer(
        CompletionReply(service, body, prompt, limit, (body.top_logprobs or 0) if body.logprobs else None)
    )


@router.post("/v1/completions")
async def post_completion(service: AdmittedService, body: CompletionRequest) -> Response:
    """Go on with a text; OpenAI's default is 16 tokens."""
    prompt = await service.run_in_tokenizer(service.codec.encode_raw, body.prompt)
    return await _answer(CompletionReply(service, body, prompt, body.max_tokens or 16, body.logprobs))


async def _answer(reply: CompletionReply) -> Response:
    if reply.body.stream:
        return StreamingResponse(reply.stream_events(), media_type="text/event-stream")
    return JSONResponse(await reply.full_response())


@router.post("/v1/score")
async def post_score(service: AdmittedService, body: ScoreRequest) -> JsonObject:
    """The log-prob of answers under both models, and their rewards."""
    examples = await service.run_in_tokenizer(
        lambda: [service.codec.encode_example(body, answer) for answer in body.answers]
    )
    answers = await service.score_examples(examples, body.tokens)
    return {"object": "score", "beta": service.origin.beta, "answers": answers}


@router.post("/v1/compare")
async def post_compare(service: AdmittedService, body: CompareRequest) -> JsonObject:
    """Which of two answers the policy prefers, and how surely."""
    example = service.codec.encode_example
    examples = await service.run_in_tokenizer(
        lambda: [example(pair, pair.chosen, pair.rejected) for pair in body.pairs]
    )
    answers = await service.score_examples(examples, body.tokens)
    pairs = [_compared(*both) for both in zip(answers[::2], answers[1::2], strict=True)]
    return {"object": "compare", "beta": service.origin.beta, "pairs": pairs}


def _compared(chosen: JsonObject, rejected: JsonObject) -> JsonObject:
    margin = chosen["reward"] - rejected["reward"]
    probability = math.exp(min(margin, 0.0)) / (1 + math.exp(-abs(margin)))  # logistic; small ones keep their digits
    preferred = None if margin == 0 else "chosen" if margin > 0 else "rejected"
    verdict = {"margin": margin, "probability": probability, "preferred": preferred}
    return verdict | {"chosen": chosen, "rejected": rejected}


@router.get("/v1/models")
async def get_models(service: ServiceDependency) -> JsonObject:
    """Both models."""
    listed = [{"id": name, "object": "model", "created": 0, "owned_by": "local"} for name in service.engines]
    return {"object": "list", "data": listed}


@router.get("/v1/run")
async def get_run(service: ServiceDependency) -> JsonObject:
    """The models, and what the training run left behind."""
    made = service.origin
    left = await asyncio.to_thread(results.read_artifacts, made.run)
    return left | {"policy": made.policy_path, "reference": made.reference_path, "note": made.reference_note}


@router.get("/health")
async def get_health() -> JsonObject:
    """The process answers."""
    return {"status": "ok"}


@router.get("/ready")
async def get_readiness(service: ServiceDependency) -> JsonObject:
    """Both models answer."""
    service.require_ready()
    return {"ready": True}


@router.get("/metrics")
async def get_metrics(service: ServiceDependency) -> Response:
    """For Prometheus."""
    for name, engine in service.engines.items():
        ACTIVE_REQUESTS.labels(name).set(len(engine.result_queues))
        CACHE_USED_RATIO.labels(name).set(engine.cache_usage)
        ENGINE_ALIVE.labels(name).set(engine.is_alive)
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@router.get("/", include_in_schema=False)
@router.get("/{name}", include_in_schema=False)
async def get_page(name: str = "index.html") -> Response:
    """A file of the page; there are no paths. Only what carries the nonce of this reply may run or style it."""
    if name not in PAGE_FILES:
        raise APIError(404, "no such page", "not_found")
    nonce = secrets.token_urlsafe(16)
    content, kind = PAGE_FILES[name].replace(b"__NONCE__", nonce.encode()), CONTENT_TYPES[name.rsplit(".", 1)[-1]]
    return Response(content, headers={"content-security-policy": PAGE_CSP.format(nonce)}, media_type=kind)


def error_response(error: Exception) -> Response:
    """What the client is told of an error; of one that is ours, nothing but that."""
    match error:
        case APIError():
            fault = error
        case HTTPException():
            fault = APIError(error.status_code, error.detail, "http_error")
        case RequestValidationError():
            first = error.errors()[0]
            place = () if first["type"] == "json_invalid" else first["loc"][1:]
            field = ".".join(map(str, place))[:200].encode("ascii", "backslashreplace").decode()
            said = "not supported" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
            fault = APIError(400, f"{field or 'body'}: {said}", first["type"], field or None)
        case _:
            fault = APIError(500, "internal error", "internal_error")
    return JSONResponse(fault.body, fault.status_code, fault.headers)


def build_app(service: InferenceService) -> FastAPI:
    """The application."""
    app = FastAPI(title="dpo-lightning", lifespan=service.lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    for kind in (HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, lambda _, error: error_response(error))
    app.include_router(router)
    return app

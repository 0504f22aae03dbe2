"""The HTTP routes.

Every error is answered with a JSON body in OpenAI's format. `security.RequestGuard` wraps the application built here.
"""

import asyncio
import math
import secrets
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from dpo.runs import results
from dpo.runs.folder import run_of_export
from dpo.serving.reply import CompletionReply, full_response
from dpo.serving.schema import (
    APIError,
    ChatRequest,
    CompareRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    ScoreRequest,
    TokenizeRequest,
)
from dpo.serving.service import ACTIVE_REQUESTS, CACHE_USED_RATIO, ENGINE_ALIVE, InferenceService, JsonObject

PAGE_FILES = {file.name: file.read_bytes() for file in (Path(__file__).parent / "page").glob("*.*")}
CONTENT_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
PAGE_CSP = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def _service(request: Request) -> InferenceService:  # async, or FastAPI would call it in a thread
    return request.app.state.service  # type: ignore[no-any-return]


ServiceDependency = Annotated[InferenceService, Depends(_service)]


async def _admitted(service: ServiceDependency) -> AsyncIterator[InferenceService]:
    """Hold one of the service's slots while a request is answered."""
    service.require_ready()
    if service.active_requests >= service.slots:
        raise APIError(429, f"{service.slots} requests are already being answered: try again", "too_many_requests")
    service.active_requests += 1
    try:
        yield service
    finally:
        service.active_requests -= 1


AdmittedService = Annotated[InferenceService, Depends(_admitted)]
ERROR_RESPONSES: dict[int | str, JsonObject] = {
    status: {"description": "An error in OpenAI's format."} for status in ("4XX", "5XX")
}
router = APIRouter(responses=ERROR_RESPONSES)


@router.post("/v1/chat/completions")
async def post_chat_completion(service: AdmittedService, body: ChatRequest) -> Response:
    """Answer a conversation given as messages."""
    prompt = await service.run_in_tokenizer(service.codec.encode_prompt, None, body.messages)
    max_tokens = body.max_completion_tokens or body.max_tokens
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return await _respond(service, body, [prompt], max_tokens, top_logprobs)


@router.post("/v1/completions")
async def post_completion(service: AdmittedService, body: CompletionRequest) -> Response:
    """Continue texts, by 16 tokens unless `max_tokens` is given (OpenAI's default)."""
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    encode = partial(service.codec.encode_raw, answer_length=min(max_tokens, 1))
    prompts = await service.run_in_tokenizer(lambda: [encode(prompt) for prompt in body.prompt])
    return await _respond(service, body, prompts, max_tokens, body.logprobs)


async def _respond(
    service: InferenceService,
    body: GenerationRequest,
    prompts: Sequence[list[int]],
    max_tokens: int | None,
    top_logprobs: int | None,
) -> Response:
    """Answer every prompt `n` times."""
    replies = [
        CompletionReply(service, body, prompt, max_tokens, top_logprobs, sample)
        for prompt in prompts
        for sample in range(body.n or 1)
    ]
    if body.stream:
        return StreamingResponse(replies[0].stream_events(), media_type="text/event-stream")
    return JSONResponse(await full_response(replies))


@router.post("/tokenize")
async def post_tokenize(service: AdmittedService, body: TokenizeRequest) -> JsonObject:
    """Return the token ids of a text or of messages, as vLLM does."""
    tokens = await service.run_in_tokenizer(service.codec.tokenize, body)
    return {"count": len(tokens), "max_model_len": service.codec.context, "tokens": tokens}


@router.post("/detokenize")
async def post_detokenize(service: AdmittedService, body: DetokenizeRequest) -> JsonObject:
    """Return the text of token ids, control tokens included, as vLLM does."""
    ids = service.codec.known_ids(body.tokens, "tokens")
    return {"prompt": await service.run_in_tokenizer(service.codec.tokenizer.decode, ids)}


@router.post("/v1/score")
async def post_score(service: AdmittedService, body: ScoreRequest) -> JsonObject:
    """Return the log-probabilities of answers under both models, in nats, and their implicit rewards."""
    examples = await service.run_in_tokenizer(service.codec.encode_score, body)
    answers = await service.score_examples(examples, body.tokens)
    return {"object": "score", "beta": service.served.beta, "answers": answers}


@router.post("/v1/compare")
async def post_compare(service: AdmittedService, body: CompareRequest) -> JsonObject:
    """Return which of two answers the policy prefers, and with what probability."""
    examples = await service.run_in_tokenizer(lambda: [service.codec.encode_pair(pair) for pair in body.pairs])
    answers = await service.score_examples(examples, body.tokens)
    pairs = [_compare(chosen, rejected) for chosen, rejected in zip(answers[::2], answers[1::2], strict=True)]
    return {"object": "compare", "beta": service.served.beta, "pairs": pairs}


def _compare(chosen: JsonObject, rejected: JsonObject) -> JsonObject:
    margin = chosen["reward"] - rejected["reward"]
    # The logistic function, written so that exp cannot overflow and small probabilities keep their digits.
    probability = math.exp(min(margin, 0.0)) / (1 + math.exp(-abs(margin)))
    preferred = None if margin == 0 else "chosen" if margin > 0 else "rejected"
    verdict = {"margin": margin, "probability": probability, "preferred": preferred}
    return verdict | {"chosen": chosen, "rejected": rejected}


@router.get("/v1/models")
async def get_models(service: ServiceDependency) -> JsonObject:
    """List the two models, `policy` and `reference`, with the tokens that their context holds."""
    same = {"object": "model", "created": 0, "owned_by": "local", "max_model_len": service.codec.context}
    models = [{"id": name, **same} for name in service.engines]
    return {"object": "list", "data": models}


@router.get("/v1/run")
async def get_run(service: ServiceDependency) -> JsonObject:
    """Return where the models came from, and the results of the training run."""
    served = service.served
    run = await asyncio.to_thread(results.read_artifacts, run_of_export(served.policy_path))
    return run | {"policy": served.policy_path, "reference": served.reference_path, "note": served.reference_note}


@router.get("/health")
async def get_health() -> JsonObject:
    """Report that the process answers requests."""
    return {"status": "ok"}


@router.get("/ready")
async def get_readiness(service: ServiceDependency) -> JsonObject:
    """Report that both models are running; status 503 while one is not."""
    service.require_ready()
    return {"ready": True}


@router.get("/metrics")
async def get_metrics(service: ServiceDependency) -> Response:
    """Return the metrics in Prometheus' text format."""
    for name, engine in service.engines.items():
        ACTIVE_REQUESTS.labels(name).set(len(engine.result_queues))
        CACHE_USED_RATIO.labels(name).set(engine.cache_usage)
        ENGINE_ALIVE.labels(name).set(engine.is_alive)
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@router.get("/", include_in_schema=False)
@router.get("/{name}", include_in_schema=False)
async def get_page(name: str = "index.html") -> Response:
    """Return a file of the web page.

    The files are in memory, so no path can lead out of the folder. The browser runs only scripts and applies only
    styles that carry this response's nonce.
    """
    if name not in PAGE_FILES:
        raise APIError(404, "no such page", "not_found")
    nonce = secrets.token_urlsafe(16)
    content = PAGE_FILES[name].replace(b"__NONCE__", nonce.encode())
    content_type = CONTENT_TYPES[name.rsplit(".", 1)[-1]]
    return Response(content, headers={"content-security-policy": PAGE_CSP.format(nonce)}, media_type=content_type)


def error_response(error: Exception) -> Response:
    """Return the response to an error in OpenAI's format; an unexpected error reveals nothing about itself."""
    match error:
        case APIError():
            api_error = error
        case HTTPException():
            api_error = APIError(error.status_code, error.detail, "http_error")
        case RequestValidationError():
            api_error = _validation_error(error)
        case _:
            api_error = APIError(500, "internal error", "internal_error")
    return JSONResponse(api_error.body, api_error.status_code, api_error.headers)


def _validation_error(error: RequestValidationError) -> APIError:
    """Describe the first invalid field; a field name sent by the client may be long or no valid Unicode."""
    first = error.errors()[0]
    location = () if first["type"] == "json_invalid" else first["loc"][1:]
    field = ".".join(map(str, location))[:200].encode("ascii", "backslashreplace").decode()
    message = "not supported" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    return APIError(400, f"{field or 'body'}: {message}", first["type"], field or None)


def build_app(service: InferenceService) -> FastAPI:
    """Return the application that serves both models and the page."""
    app = FastAPI(title="dpo-lightning", lifespan=service.lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    for exception_class in (HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(exception_class, lambda _, error: error_response(error))
    app.include_router(router)
    return app

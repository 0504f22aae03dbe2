"""The answers to one generation request, in OpenAI's format: as one object, or as a stream of server-sent events."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from itertools import accumulate

from dpo.data.columns import HUMAN_MARKER
from dpo.models.batch import Example
from dpo.models.generation import derive_seed
from dpo.serving.engine import TokenLogprob, TokenSampler
from dpo.serving.schema import APIError, ChatRequest, CompletionRequest, GenerationRequest
from dpo.serving.service import FIRST_TOKEN_SECONDS, TOKEN_COUNTER, InferenceService, JsonObject
from dpo.serving.tokenization import StreamDecoder


class CompletionReply:
    """One generated answer to a request.

    Args:
        service: The models.
        body: The request.
        prompt: Token ids of the prompt.
        max_tokens: Maximum tokens of the answer; None allows all that the context has room for.
        top_logprobs: How many of the most probable tokens to report per token, beside its own log-probability; None
            reports no log-probabilities.
        sample: Which of the request's `n` answers to the prompt it is; each has a seed of its own.

    Attributes:
        answer_tokens: Token ids of the answer so far.
        token_texts: The text that each of them adds.

    Raises:
        APIError: The model is unknown, or `max_tokens` exceeds the context.
    """

    def __init__(
        self,
        service: InferenceService,
        body: GenerationRequest,
        prompt: list[int],
        max_tokens: int | None,
        top_logprobs: int | None,
        sample: int = 0,
    ) -> None:
        codec = service.codec
        if body.model not in service.engines:
            raise APIError(404, "expected the model 'policy' or 'reference'", "model_not_found", "model")
        if max_tokens and max_tokens > codec.context:
            message = f"max_tokens: expected at most {codec.context}, got {max_tokens}"
            raise APIError(400, message, "context_length_exceeded", "max_tokens")
        self.service = service
        self.body = body
        self.prompt = prompt
        self.is_chat = isinstance(body, ChatRequest)
        self.echo = isinstance(body, CompletionRequest) and bool(body.echo)
        room = codec.context - len(prompt)
        self.max_tokens = room if max_tokens is None else min(max_tokens, room)
        temperature, top_p = (1.0 if value is None else value for value in (body.temperature, body.top_p))
        seed = secrets.randbits(62) if body.seed is None else body.seed
        # The first answer has the seed itself, so that it is the same whatever `n` is.
        self.token_sampler = TokenSampler(
            temperature, top_p, derive_seed(seed, sample) if sample else seed, top_logprobs
        )
        hh_dialogue = self.is_chat and codec.encoder.format == "hh"
        stops = (body.stop or []) + [HUMAN_MARKER] * hh_dialogue
        self.writer = StreamDecoder(codec, prompt, stops, skip_space=hh_dialogue)
        self.role_field = {"role": "assistant"}  # sent once, as clients concatenate the fields of all chunks
        self.answer_tokens: list[int] = []
        self.token_texts: list[str] = []

    async def generate_pieces(self) -> AsyncGenerator[tuple[str, list[str], str | None]]:
        """Generate the answer until an end token, a stop string or the limit.

        Yields:
            The text to show, the texts of the new tokens (text that may begin a stop string is held back, so the two
            can differ), and the finish reason: None for all but the last piece.
        """
        name = self.body.model
        end_ids = self.service.codec.encoder.end_ids
        started = time.perf_counter()
        TOKEN_COUNTER.labels(name, "prompt").inc(len(self.prompt))
        generation = self.service.engines[name].generate(self.prompt, self.token_sampler, self.max_tokens, end_ids)
        async with self.service.generation_slots, aclosing(generation) as steps:
            async for tokens in steps:
                if not self.answer_tokens:
                    FIRST_TOKEN_SECONDS.labels(name).observe(time.perf_counter() - started)
                new_texts = self.writer.decode_tokens(tokens[len(self.answer_tokens) :])
                self.answer_tokens = tokens
                self.token_texts += new_texts
                TOKEN_COUNTER.labels(name, "completion").inc(len(new_texts))
                ended = tokens[-1] in end_ids
                full = len(tokens) >= self.max_tokens
                text = self.writer.release_text(new_texts, last=ended or full)
                finish_reason = "stop" if ended or self.writer.is_stopped else "length" if full else None
                yield text, new_texts, finish_reason
                if finish_reason:
                    return

    def _choice(self, part: str, text: str, finish_reason: str | None, logprobs: JsonObject | None) -> JsonObject:
        content = {part: self.role_field | {"content": text}} if self.is_chat else {"text": text}
        self.role_field = {}
        return {"index": 0, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _newest_logprobs(self, new_texts: list[str]) -> JsonObject | None:
        """Return the log-probabilities of the newest tokens."""
        start = len(self.token_texts) - len(new_texts)
        return self._logprobs(new_texts, self.token_sampler.logprobs[start:], len("".join(self.token_texts[:start])))

    def _logprobs(
        self, texts: Sequence[str], scored: Sequence[TokenLogprob | None], offset: int = 0
    ) -> JsonObject | None:
        """Return log-probabilities as OpenAI does; None stands for a token that nothing predicts."""
        if self.token_sampler.top_logprobs is None:
            return None
        decode = self.service.codec.tokenizer.decode
        # Not strict: the batching thread may have recorded further tokens by now.
        rows = [
            (
                text,
                entry and _finite(entry[0]),
                [(str(decode([id])), _finite(logp)) for id, logp in entry[1]] if entry else [],
            )
            for text, entry in zip(texts, scored, strict=False)
        ]
        if self.is_chat:
            content = [_token(text, logp) | {"top_logprobs": [_token(*one) for one in top]} for text, logp, top in rows]
            return {"content": content}
        return {
            "tokens": list(texts),
            "token_logprobs": [logprob for _, logprob, _ in rows],
            # Reversed, so that of tokens with the same text the most probable one stays.
            "top_logprobs": [None if logprob is None else dict(reversed(top)) for _, logprob, top in rows],
            "text_offset": [*accumulate(map(len, texts), initial=offset)][:-1],
        }

    async def _reward(self) -> JsonObject:
        """Score the shown part of the answer: without a stop string and any token that overlaps it."""
        if not self.body.reward:
            return {}
        ends = list(accumulate(map(len, self.token_texts)))
        shown = sum(end <= ends[-1] - len(self.writer.held_text) for end in ends)
        example = Example("reply", self.prompt, (self.answer_tokens[: max(shown, 1)],))
        [scored] = await self.service.score_examples([example], False)
        return {"reward": scored}

    def head(self, suffix: str) -> JsonObject:
        """Return the fields of a reply beside its choices."""
        prefix, kind = ("chatcmpl-", f"chat.completion{suffix}") if self.is_chat else ("cmpl-", "text_completion")
        reply_id = prefix + secrets.token_hex(12)
        return {"id": reply_id, "object": kind, "created": int(time.time()), "model": self.body.model}

    async def answer(self) -> tuple[str, str, JsonObject]:
        """Generate the whole answer, and return its text, its finish reason and its reward."""
        pieces = [piece async for piece in self.generate_pieces()] if self.max_tokens else [("", [], "length")]
        texts, _, finish_reasons = zip(*pieces, strict=True)
        return "".join(texts), str(finish_reasons[-1]), await self._reward()

    def whole_choice(self, text: str, finish_reason: str, echoed: Sequence[TokenLogprob | None]) -> JsonObject:
        """Return the finished answer, after its prompt if that is to be repeated."""
        prompt_texts = self.service.codec.token_texts(self.prompt) if self.echo else []
        logprobs = self._logprobs(prompt_texts + self.token_texts, [*echoed, *self.token_sampler.logprobs])
        return self._choice("message", "".join(prompt_texts) + text, finish_reason, logprobs)

    async def stream_events(self) -> AsyncGenerator[str]:
        """Yield the answer as server-sent events; an error on the way becomes the last event."""
        include_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        head = self.head(".chunk") | ({"usage": None} if include_usage else {})
        try:
            async with aclosing(self.generate_pieces()) as pieces:
                async for text, new_texts, finish_reason in pieces:
                    if text or finish_reason or self.token_sampler.logprobs:
                        choice = self._choice("delta", text, finish_reason, self._newest_logprobs(new_texts))
                        yield _event(head | {"choices": [choice | (await self._reward() if finish_reason else {})]})
            if include_usage:
                yield _event(head | {"choices": [], "usage": _usage([self])})
            yield "data: [DONE]\n\n"
        except APIError as error:
            yield _event(error.body)


async def full_response(replies: Sequence[CompletionReply]) -> JsonObject:
    """Return all answers to one request as one object; they are generated side by side."""
    first = replies[0]
    answering = asyncio.gather(*(reply.answer() for reply in replies))
    echoes, answers = await asyncio.gather(_echoed(replies), answering)

    def choices() -> list[JsonObject]:
        parts = enumerate(zip(replies, echoes, answers, strict=True))
        return [
            reply.whole_choice(text, reason, echoed) | {"index": index} | reward
            for index, (reply, echoed, (text, reason, reward)) in parts
        ]

    body = {"choices": await first.service.run_in_tokenizer(choices), "usage": _usage(replies)}
    return first.head("") | body


async def _echoed(replies: Sequence[CompletionReply]) -> list[list[TokenLogprob | None]]:
    """Return the log-probabilities of every reply's prompt, or nothing where they are not to be repeated."""
    first = replies[0]
    count = first.token_sampler.top_logprobs
    if not first.echo or count is None:
        return [[] for _ in replies]
    n = first.body.n or 1
    scored = await first.service.prompt_logprobs(first.body.model, [reply.prompt for reply in replies[::n]], count)
    return [prompt for prompt in scored for _ in range(n)]


def _usage(replies: Sequence[CompletionReply]) -> JsonObject:
    """Return the token counts; a prompt counts once, however many answers it gets."""
    prompt = sum(len(reply.prompt) for reply in replies[:: replies[0].body.n or 1])
    answer = sum(len(reply.answer_tokens) for reply in replies)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)


def _token(text: str, logprob: float | None) -> JsonObject:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _event(body: JsonObject) -> str:
    return f"data: {json.dumps(body)}\n\n"

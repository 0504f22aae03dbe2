"""The answer to one generation request, in OpenAI's format: as one object, or as a stream of server-sent events."""

import json
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from itertools import accumulate

from dpo.data.columns import HUMAN_MARKER
from dpo.models.batch import Example
from dpo.serving.engine import TokenSampler
from dpo.serving.schema import APIError, ChatRequest, GenerationRequest
from dpo.serving.service import FIRST_TOKEN_SECONDS, TOKEN_COUNTER, InferenceService, JsonObject
from dpo.serving.tokenization import StreamDecoder


class CompletionReply:
    """The generated answer to one request.

    Args:
        service: The models.
        body: The request.
        prompt: Token ids of the prompt.
        max_tokens: Maximum tokens of the answer; None allows all that the context has room for.
        top_logprobs: How many of the most probable tokens to report per token, beside its own log-probability; None
            reports no log-probabilities.

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
        self.max_tokens = min(max_tokens or codec.context, codec.context - len(prompt))
        temperature, top_p = (1.0 if value is None else value for value in (body.temperature, body.top_p))
        seed = secrets.randbits(62) if body.seed is None else body.seed
        self.token_sampler = TokenSampler(temperature, top_p, seed, top_logprobs)
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
        async with aclosing(generation) as steps:
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

    def _choice(self, part: str, text: str, new_texts: list[str], finish_reason: str | None) -> JsonObject:
        content = {part: self.role_field | {"content": text}} if self.is_chat else {"text": text}
        self.role_field = {}
        logprobs = None if self.token_sampler.top_logprobs is None else self._logprobs(new_texts)
        return {"index": 0, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, new_texts: list[str]) -> JsonObject:
        """Return the log-probabilities of the newest tokens."""
        start = len(self.token_texts) - len(new_texts)
        decode = self.service.codec.tokenizer.decode
        entries = [
            _token(text, logprob) | {"top_logprobs": [_token(str(decode([token])), value) for token, value in top]}
            # Not strict: the batching thread may have recorded further tokens by now.
            for text, (logprob, top) in zip(new_texts, self.token_sampler.logprobs[start:], strict=False)
        ]
        if self.is_chat:
            return {"content": entries}
        return {
            "tokens": new_texts,
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
            "text_offset": [*accumulate(map(len, new_texts), initial=len("".join(self.token_texts[:start])))][:-1],
        }

    @property
    def _usage(self) -> JsonObject:
        prompt = len(self.prompt)
        answer = len(self.answer_tokens)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    async def _reward(self) -> JsonObject:
        """Score the shown part of the answer: without a stop string and any token that overlaps it."""
        if not self.body.reward:
            return {}
        ends = list(accumulate(map(len, self.token_texts)))
        shown = sum(end <= ends[-1] - len(self.writer.held_text) for end in ends)
        example = Example("reply", self.prompt, (self.answer_tokens[: max(shown, 1)],))
        [scored] = await self.service.score_examples([example], False)
        return {"reward": scored}

    def _head(self, suffix: str) -> JsonObject:
        prefix, kind = ("chatcmpl-", f"chat.completion{suffix}") if self.is_chat else ("cmpl-", "text_completion")
        reply_id = prefix + secrets.token_hex(12)
        return {"id": reply_id, "object": kind, "created": int(time.time()), "model": self.body.model}

    async def full_response(self) -> JsonObject:
        """Return the whole answer as one object."""
        texts, _, finish_reasons = zip(*[piece async for piece in self.generate_pieces()], strict=True)
        choice = self._choice("message", "".join(texts), self.token_texts, finish_reasons[-1])
        return self._head("") | {"choices": [choice], "usage": self._usage} | await self._reward()

    async def stream_events(self) -> AsyncGenerator[str]:
        """Yield the answer as server-sent events; an error on the way becomes the last event."""
        include_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        head = self._head(".chunk") | ({"usage": None} if include_usage else {})
        try:
            async with aclosing(self.generate_pieces()) as pieces:
                async for text, new_texts, finish_reason in pieces:
                    if text or finish_reason or self.token_sampler.logprobs:
                        choice = self._choice("delta", text, new_texts, finish_reason)
                        yield _event(head | {"choices": [choice]} | (await self._reward() if finish_reason else {}))
            if include_usage:
                yield _event(head | {"choices": [], "usage": self._usage})
            yield "data: [DONE]\n\n"
        except APIError as error:
            yield _event(error.body)


def _token(text: str, logprob: float) -> JsonObject:
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}


def _event(body: JsonObject) -> str:
    return f"data: {json.dumps(body)}\n\n"

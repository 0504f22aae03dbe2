"""One admitted request -> the pieces of its reply, in OpenAI's form, as a stream or whole.

Takes token ids and what the client asked for. Knows no routes.
"""

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
    """The answer to one request: at most `limit` tokens (None: what the context leaves).

    Of each are told its log-prob and those of the `top` most probable ones; nothing where that is None.
    """

    def __init__(
        self,
        service: InferenceService,
        body: GenerationRequest,
        prompt: list[int],
        max_tokens: int | None,
        top_logprobs: int | None,
    ) -> None:
        context, self.is_chat = service.codec.context, isinstance(body, ChatRequest)
        if body.model not in service.engines:
            raise APIError(404, "expected the model 'policy' or 'reference'", "model_not_found", "model")
        if max_tokens and max_tokens > context:
            message = f"max_tokens: expected at most {context}, got {max_tokens}"
            raise APIError(400, message, "context_length_exceeded", "max_tokens")
        self.service, self.body, self.prompt = service, body, prompt
        self.max_tokens = min(max_tokens or context, context - len(prompt))
        temperature, top_p = (1.0 if value is None else value for value in (body.temperature, body.top_p))
        self.token_sampler = TokenSampler(
            temperature, top_p, secrets.randbits(62) if body.seed is None else body.seed, top_logprobs
        )
        dialogue = self.is_chat and not service.codec.encoder.uses_chat_template
        self.writer = StreamDecoder(
            service.codec, prompt, (body.stop or []) + [HUMAN_MARKER] * dialogue, skip_space=dialogue
        )
        self.role_field = {"role": "assistant"}  # said once: clients join what the chunks of a stream say
        self.answer_tokens: list[int] = []  # of the answer
        self.token_texts: list[str] = []  # what each of them adds

    async def generate_pieces(self) -> AsyncGenerator[tuple[str, list[str], str | None]]:
        """Text to show and words that came, until an end, a stop string or the limit; the last says which it was."""
        name, ends, started = self.body.model, self.service.codec.encoder.end_ids, time.perf_counter()
        TOKEN_COUNTER.labels(name, "prompt").inc(len(self.prompt))
        async with aclosing(
            self.service.engines[name].generate(self.prompt, self.token_sampler, self.max_tokens, ends)
        ) as steps:
            async for tokens in steps:
                if not self.answer_tokens:
                    FIRST_TOKEN_SECONDS.labels(name).observe(time.perf_counter() - started)
                words, self.answer_tokens = self.writer.decode_tokens(tokens[len(self.answer_tokens) :]), tokens
                self.token_texts += words
                TOKEN_COUNTER.labels(name, "completion").inc(len(words))
                ended, full = tokens[-1] in ends, len(tokens) >= self.max_tokens
                text = self.writer.release_text(words, last=ended or full)
                finish = "stop" if ended or self.writer.is_stopped else "length" if full else None
                yield text, words, finish
                if finish:
                    return

    def _choice(self, part: str, text: str, words: list[str], finish: str | None) -> JsonObject:
        said = {part: self.role_field | {"content": text}} if self.is_chat else {"text": text}
        self.role_field = {}
        logprobs = None if self.token_sampler.top_logprobs is None else self._logprobs(words)
        return {"index": 0, **said, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, words: list[str]) -> JsonObject:
        """Of the newest words."""
        before, decode = len(self.token_texts) - len(words), self.service.codec.tokenizer.decode
        told = [
            _token(word, logprob) | {"top_logprobs": [_token(str(decode([token])), value) for token, value in top]}
            for word, (logprob, top) in zip(
                words, self.token_sampler.logprobs[before:], strict=False
            )  # that may be ahead
        ]
        if self.is_chat:
            return {"content": told}
        return {
            "tokens": words,
            "token_logprobs": [token["logprob"] for token in told],
            "top_logprobs": [{top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in told],
            "text_offset": [*accumulate(map(len, words), initial=len("".join(self.token_texts[:before])))][:-1],
        }

    @property
    def _usage(self) -> JsonObject:
        read, written = len(self.prompt), len(self.answer_tokens)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    async def _reward(self) -> JsonObject:
        """Of what was said: without a stop string and what runs into it."""
        if not self.body.reward:
            return {}
        ends = list(accumulate(map(len, self.token_texts)))
        said = sum(end <= ends[-1] - len(self.writer.held_text) for end in ends)
        [scored] = await self.service.score_examples(
            [Example("reply", self.prompt, (self.answer_tokens[: max(said, 1)],))], False
        )
        return {"reward": scored}

    def _head(self, part: str) -> JsonObject:
        prefix, kind = ("chatcmpl-", f"chat.completion{part}") if self.is_chat else ("cmpl-", "text_completion")
        made = {"id": prefix + secrets.token_hex(12), "object": kind, "created": int(time.time())}
        return made | {"model": self.body.model}

    async def full_response(self) -> JsonObject:
        """The reply as one object."""
        texts, _, finishes = zip(*[piece async for piece in self.generate_pieces()], strict=True)
        choice = self._choice("message", "".join(texts), self.token_texts, finishes[-1])
        return self._head("") | {"choices": [choice], "usage": self._usage} | await self._reward()

    async def stream_events(self) -> AsyncGenerator[str]:
        """The reply as server-sent events; what goes wrong on the way is the last one."""
        counted = self.body.stream_options is not None and self.body.stream_options.include_usage
        head = self._head(".chunk") | ({"usage": None} if counted else {})
        try:
            async with aclosing(self.generate_pieces()) as pieces:
                async for text, words, finish in pieces:
                    if text or finish or self.token_sampler.logprobs:
                        choice = self._choice("delta", text, words, finish)
                        yield _event(head | {"choices": [choice]} | (await self._reward() if finish else {}))
            if counted:
                yield _event(head | {"choices": [], "usage": self._usage})
            yield "data: [DONE]\n\n"
        except APIError as fault:
            yield _event(fault.body)


def _token(text: str, logprob: float) -> JsonObject:
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}


def _event(body: JsonObject) -> str:
    return f"data: {json.dumps(body)}\n\n"

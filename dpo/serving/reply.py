"""One admitted request -> the pieces of its reply, in OpenAI's form, as a stream or whole.

Takes token ids and what the client asked for. Knows no routes.
"""

import json
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from itertools import accumulate

from dpo.data.columns import HUMAN
from dpo.models.batch import Example
from dpo.serving.engine import Draw
from dpo.serving.schema import ChatRequest, Fault, Generation
from dpo.serving.service import FIRST, TOKENS, Json, Service
from dpo.serving.tokenization import Writer


class Reply:
    """The answer to one request: at most `limit` tokens (None: what the context leaves).

    Of each are told its log-prob and those of the `top` most probable ones; nothing where that is None.
    """

    def __init__(
        self, service: Service, body: Generation, prompt: list[int], limit: int | None, top: int | None
    ) -> None:
        context, self.chat = service.text.context, isinstance(body, ChatRequest)
        if body.model not in service.engines:
            raise Fault(404, "expected the model 'policy' or 'reference'", "model_not_found", "model")
        if limit and limit > context:
            message = f"max_tokens: expected at most {context}, got {limit}"
            raise Fault(400, message, "context_length_exceeded", "max_tokens")
        self.service, self.body, self.prompt = service, body, prompt
        self.limit = min(limit or context, context - len(prompt))
        temperature, top_p = (1.0 if value is None else value for value in (body.temperature, body.top_p))
        self.draw = Draw(temperature, top_p, secrets.randbits(62) if body.seed is None else body.seed, top)
        dialogue = self.chat and not service.text.encoder.chat
        self.writer = Writer(service.text, prompt, (body.stop or []) + [HUMAN] * dialogue, skip_space=dialogue)
        self.speaker = {"role": "assistant"}  # said once: clients join what the chunks of a stream say
        self.tokens: list[int] = []  # of the answer
        self.words: list[str] = []  # what each of them adds

    async def pieces(self) -> AsyncGenerator[tuple[str, list[str], str | None]]:
        """Text to show and words that came, until an end, a stop string or the limit; the last says which it was."""
        name, ends, started = self.body.model, self.service.text.encoder.end_ids, time.perf_counter()
        TOKENS.labels(name, "prompt").inc(len(self.prompt))
        async with aclosing(self.service.engines[name].generate(self.prompt, self.draw, self.limit, ends)) as steps:
            async for tokens in steps:
                if not self.tokens:
                    FIRST.labels(name).observe(time.perf_counter() - started)
                words, self.tokens = self.writer.words(tokens[len(self.tokens) :]), tokens
                self.words += words
                TOKENS.labels(name, "completion").inc(len(words))
                ended, full = tokens[-1] in ends, len(tokens) >= self.limit
                text = self.writer.write(words, last=ended or full)
                finish = "stop" if ended or self.writer.stopped else "length" if full else None
                yield text, words, finish
                if finish:
                    return

    def _choice(self, part: str, text: str, words: list[str], finish: str | None) -> Json:
        said = {part: self.speaker | {"content": text}} if self.chat else {"text": text}
        self.speaker = {}
        logprobs = None if self.draw.top_logprobs is None else self._logprobs(words)
        return {"index": 0, **said, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, words: list[str]) -> Json:
        """Of the newest words."""
        before, decode = len(self.words) - len(words), self.service.text.tokenizer.decode
        told = [
            _token(word, logprob) | {"top_logprobs": [_token(str(decode([token])), value) for token, value in top]}
            for word, (logprob, top) in zip(words, self.draw.logprobs[before:], strict=False)  # that may be ahead
        ]
        if self.chat:
            return {"content": told}
        return {
            "tokens": words,
            "token_logprobs": [token["logprob"] for token in told],
            "top_logprobs": [{top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in told],
            "text_offset": [*accumulate(map(len, words), initial=len("".join(self.words[:before])))][:-1],
        }

    @property
    def _usage(self) -> Json:
        read, written = len(self.prompt), len(self.tokens)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    async def _reward(self) -> Json:
        """Of what was said: without a stop string and what runs into it."""
        if not self.body.reward:
            return {}
        ends = list(accumulate(map(len, self.words)))
        said = sum(end <= ends[-1] - len(self.writer.held) for end in ends)
        [scored] = await self.service.score([Example("reply", self.prompt, (self.tokens[: max(said, 1)],))], False)
        return {"reward": scored}

    def _head(self, part: str) -> Json:
        prefix, kind = ("chatcmpl-", f"chat.completion{part}") if self.chat else ("cmpl-", "text_completion")
        made = {"id": prefix + secrets.token_hex(12), "object": kind, "created": int(time.time())}
        return made | {"model": self.body.model}

    async def whole(self) -> Json:
        """The reply as one object."""
        texts, _, finishes = zip(*[piece async for piece in self.pieces()], strict=True)
        choice = self._choice("message", "".join(texts), self.words, finishes[-1])
        return self._head("") | {"choices": [choice], "usage": self._usage} | await self._reward()

    async def stream(self) -> AsyncGenerator[str]:
        """The reply as server-sent events; what goes wrong on the way is the last one."""
        counted = self.body.stream_options is not None and self.body.stream_options.include_usage
        head = self._head(".chunk") | ({"usage": None} if counted else {})
        try:
            async with aclosing(self.pieces()) as pieces:
                async for text, words, finish in pieces:
                    if text or finish or self.draw.logprobs:
                        choice = self._choice("delta", text, words, finish)
                        yield _event(head | {"choices": [choice]} | (await self._reward() if finish else {}))
            if counted:
                yield _event(head | {"choices": [], "usage": self._usage})
            yield "data: [DONE]\n\n"
        except Fault as fault:
            yield _event(fault.body)


def _token(text: str, logprob: float) -> Json:
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}


def _event(body: Json) -> str:
    return f"data: {json.dumps(body)}\n\n"

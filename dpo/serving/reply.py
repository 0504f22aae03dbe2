"""One admitted request -> the pieces of its reply, in OpenAI's form, as a stream or whole.

Takes token ids and what the client asked for. Knows no routes.
"""

import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from itertools import accumulate, chain

from dpo.batch import Example
from dpo.serving.engine import Draw
from dpo.serving.schema import Fault, Generation
from dpo.serving.service import Json, Service
from dpo.serving.text import HUMAN, Writer


@dataclass(frozen=True)
class Form:
    """How an endpoint says the same things."""

    prefix: str
    names: tuple[str, str]  # of the whole and of a part
    whole: Callable[[str], Json]
    part: Callable[[str], Json]
    logprobs: Callable[[list[Json], int], Json]  # of these tokens, before which so many characters were said


def _legacy(tokens: list[Json], start: int) -> Json:
    return {
        "tokens": [token["token"] for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": [{top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in tokens],
        "text_offset": [*accumulate((len(token["token"]) for token in tokens), initial=start)][: len(tokens)],
    }


CHAT = Form(
    "chatcmpl-",
    ("chat.completion", "chat.completion.chunk"),
    lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    lambda text: {"delta": {"role": "assistant", "content": text}},
    lambda tokens, _: {"content": tokens, "refusal": None},
)
COMPLETION = Form("cmpl-", ("text_completion",) * 2, lambda text: {"text": text}, lambda text: {"text": text}, _legacy)


class Reply:
    """The answer to one request.

    Args:
        limit: Most tokens of it; None is what the context leaves.
        top: Alternatives to tell of each token; None where no log-probs are asked for.

    Raises:
        Fault: It asks for more tokens than there can be.
    """

    def __init__(
        self, service: Service, form: Form, body: Generation, prompt: list[int], limit: int | None, top: int | None
    ) -> None:
        context, dialogue = service.text.context, form is CHAT and not service.text.encoder.chat
        if body.model not in service.engines:
            raise Fault(404, "expected the model 'policy' or 'reference'", "model_not_found", "model")
        if (limit or 0) > context:
            message = f"max_tokens: expected at most {context}, got {limit}"
            raise Fault(400, message, "context_length_exceeded", "max_tokens")
        self.service, self.form, self.body, self.prompt = service, form, body, prompt
        self.limit = min(limit or context, context - len(prompt))
        temperature, top_p = (1.0 if value is None else value for value in (body.temperature, body.top_p))
        self.draw = Draw(temperature, top_p, secrets.randbits(62) if body.seed is None else body.seed, top)
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        self.writer = Writer(service.text, prompt, [*stops, *([HUMAN] if dialogue else [])], skip_space=dialogue)
        self.generated: list[int] = []
        self.words: list[str] = []  # what each of them adds
        self.said = 0  # characters of described tokens
        self.head: Json = {"id": form.prefix + secrets.token_hex(12), "created": int(time.time()), "model": body.model}

    async def pieces(self) -> AsyncGenerator[tuple[str, list[Json], str | None]]:
        """Text and tokens that each step adds, until an end, a stop string or the limit; the last says which it was."""
        engine, ends = self.service.engines[self.body.model], self.service.text.encoder.end_ids
        metrics, started = self.service.metrics, time.perf_counter()
        metrics.tokens.labels(self.body.model, "prompt").inc(len(self.prompt))
        async with aclosing(engine.generate(self.prompt, self.draw, self.limit, ends)) as steps:
            async for tokens in steps:
                if not self.generated:
                    metrics.first.labels(self.body.model).observe(time.perf_counter() - started)
                new, self.generated = tokens[len(self.generated) :], tokens
                metrics.tokens.labels(self.body.model, "completion").inc(len(new))
                ended, full, words = tokens[-1] in ends, len(tokens) >= self.limit, self.writer.words(new)
                self.words += words
                text = self.writer.write(words, last=ended or full)
                finish = "stop" if ended or self.writer.stopped else "length" if full else None
                yield text, self._described(words), finish
                if finish:
                    return

    def _described(self, words: list[str]) -> list[Json]:
        start, decode = len(self.generated) - len(words), self.service.text.tokenizer.decode
        return [
            _token(word, logprob) | {"top_logprobs": [_token(str(decode([token])), value) for token, value in top]}
            for word, (logprob, top) in zip(words, self.draw.logprobs[start:], strict=False)
        ]

    def _choice(self, content: Json, tokens: list[Json], finish: str | None) -> Json:
        logprobs = None if self.draw.top_logprobs is None else self.form.logprobs(tokens, self.said)
        self.said += sum(len(token["token"]) for token in tokens)
        return {"index": 0, **content, "logprobs": logprobs, "finish_reason": finish}

    @property
    def usage(self) -> Json:
        """OpenAI's token counts."""
        counts = {"prompt_tokens": len(self.prompt), "completion_tokens": len(self.generated)}
        return counts | {"total_tokens": sum(counts.values())}

    async def _reward(self) -> Json:
        if not self.body.reward:
            return {}
        kept, over = len(self.generated), len(self.writer.held) if self.writer.stopped else 0
        while over > 0 and kept > 1:  # a stop string, and what runs into it, was not said
            kept -= 1
            over -= len(self.words[kept])
        answer = self.generated[:kept]
        [scored] = await self.service.score([Example(self.head["id"], self.prompt, (answer,))], tokens=False)
        return {"reward": scored}

    async def whole(self) -> Json:
        """The reply as one object."""
        texts, tokens, finishes = zip(*[piece async for piece in self.pieces()], strict=True)
        choice = self._choice(self.form.whole("".join(texts)), list(chain(*tokens)), finishes[-1])
        told = {"object": self.form.names[0], "choices": [choice], "usage": self.usage}
        return self.head | told | await self._reward()

    async def stream(self) -> AsyncGenerator[str]:
        """The reply as server-sent events; what goes wrong on the way is the last one."""
        counted = self.body.stream_options is not None and self.body.stream_options.include_usage
        head = self.head | {"object": self.form.names[1]} | ({"usage": None} if counted else {})
        try:
            async with aclosing(self.pieces()) as pieces:
                async for text, tokens, finish in pieces:
                    if text or tokens or finish:
                        choices = [self._choice(self.form.part(text), tokens, finish)]
                        yield _event(head | {"choices": choices} | (await self._reward() if finish else {}))
            if counted:
                yield _event(head | {"choices": [], "usage": self.usage})
            yield "data: [DONE]\n\n"
        except Fault as fault:
            yield _event(fault.body)


def _token(text: str, logprob: float) -> Json:
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}


def _event(body: Json) -> str:
    return f"data: {json.dumps(body)}\n\n"

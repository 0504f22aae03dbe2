"""One admitted request -> the pieces of its reply, in OpenAI's form, as a stream or whole.

Takes token ids and what the client asked for. Knows no HTTP.
"""

import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from dpo.batch import Example
from dpo.serving.engine import Engine, Unavailable
from dpo.serving.sampling import Draw
from dpo.serving.schema import Fault, Generation
from dpo.serving.text import Text, Writer

Json = dict[str, Any]
Reward = Callable[[Example], Awaitable[Json]]
DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Form:
    """How an endpoint says the same things."""

    prefix: str
    whole_name: str
    part_name: str
    whole: Callable[[str], Json]
    part: Callable[[str], Json]
    logprobs: Callable[[list[Json]], Json]


def _legacy(tokens: list[Json]) -> Json:
    return {
        "tokens": [token["token"] for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": [{top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in tokens],
        "text_offset": [sum(len(before["token"]) for before in tokens[:i]) for i in range(len(tokens))],
    }


CHAT = Form(
    "chatcmpl-",
    "chat.completion",
    "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    lambda text: {"delta": {"role": "assistant", "content": text}},
    lambda tokens: {"content": tokens, "refusal": None},
)
COMPLETION = Form(
    "cmpl-", "text_completion", "text_completion", lambda text: {"text": text}, lambda text: {"text": text}, _legacy
)


@dataclass(frozen=True)
class Piece:
    """What one step added; `finish` is given with the last one."""

    text: str
    tokens: list[Json]
    finish: str | None


class Reply:
    """The answer to one request."""

    def __init__(self, form: Form, body: Generation, engine: Engine, text: Text, prompt: list[int], limit: int) -> None:
        self.form, self.body, self.engine, self.text, self.prompt = form, body, engine, text, prompt
        self.limit = min(limit, text.context - len(prompt))
        self.generated: list[int] = []
        self.head: Json = {"id": form.prefix + secrets.token_hex(12), "created": int(time.time()), "model": body.model}

    async def pieces(self, draw: Draw, writer: Writer) -> AsyncGenerator[Piece]:
        """Everything that is said, until an end, a stop string or the limit."""
        ends = self.text.encoder.end_ids
        async with aclosing(self.engine.generate(self.prompt, draw, self.limit, ends)) as steps:
            async for tokens in steps:
                new, self.generated = tokens[len(self.generated) :], tokens
                ended = tokens[-1] in ends
                text, words = writer.write(new, last=ended or len(tokens) >= self.limit)
                finish = "stop" if ended or writer.stopped else "length" if len(tokens) >= self.limit else None
                yield Piece(text, self._described(draw, new, words), finish)
                if finish:
                    return

    def _described(self, draw: Draw, new: list[int], words: list[str]) -> list[Json]:
        start = len(self.generated) - len(new)
        described = []
        for word, (logprob, top) in zip(words, draw.logprobs[start:], strict=False):
            alternatives = [_token(str(self.text.tokenizer.decode([token])), value) for token, value in top]
            described.append(_token(word, logprob) | {"top_logprobs": alternatives})
        return described

    @property
    def usage(self) -> Json:
        """OpenAI's token counts."""
        counts = {"prompt_tokens": len(self.prompt), "completion_tokens": len(self.generated)}
        return counts | {"total_tokens": sum(counts.values())}

    def _choice(self, content: Json, tokens: list[Json], finish: str | None) -> Json:
        logprobs = self.form.logprobs(tokens) if self.body.top is not None else None
        return {"index": 0, **content, "logprobs": logprobs, "finish_reason": finish}

    async def whole(self, pieces: AsyncGenerator[Piece], reward: Reward | None) -> Json:
        """The reply as one object."""
        async with aclosing(pieces) as parts:
            said = [piece async for piece in parts]
        content = self.form.whole("".join(piece.text for piece in said))
        choice = self._choice(content, [token for piece in said for token in piece.tokens], said[-1].finish)
        reply = self.head | {"object": self.form.whole_name, "choices": [choice], "usage": self.usage}
        return reply | await self._rewarded(reward)

    async def stream(self, pieces: AsyncGenerator[Piece], reward: Reward | None) -> AsyncGenerator[str]:
        """The reply as server-sent events; what goes wrong on the way is the last one."""
        head = self.head | {"object": self.form.part_name} | ({"usage": None} if self.body.usage_streamed else {})
        try:
            async with aclosing(pieces) as parts:
                async for piece in parts:
                    if piece.text or piece.tokens or piece.finish:
                        choice = self._choice(self.form.part(piece.text), piece.tokens, piece.finish)
                        rewarded = await self._rewarded(reward) if piece.finish else {}
                        yield _event(head | {"choices": [choice]} | rewarded)
            if self.body.usage_streamed:
                yield _event(head | {"choices": [], "usage": self.usage})
            yield DONE
        except Unavailable as error:
            yield _event(Fault(503, str(error), "unavailable").body)

    async def _rewarded(self, reward: Reward | None) -> Json:
        if reward is None:
            return {}
        return {"reward": await reward(Example(self.head["id"], self.prompt, (self.generated,)))}


def _token(text: str, logprob: float) -> Json:
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}


def _event(body: Json) -> str:
    return f"data: {json.dumps(body)}\n\n"

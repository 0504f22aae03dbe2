"""What stands in front of the application: who may ask, how much, and for how long.

Takes any ASGI application. Everything is read, checked and limited here, before a route sees it; a request ends when
its client leaves.
"""

import asyncio
import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import suppress
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from dpo.serving.app import PAGE, fault_response
from dpo.serving.metrics import Metrics
from dpo.serving.schema import Fault

BODY_BYTES = 2**20
HEAD_SECONDS = BODY_SECONDS = 10.0
SEND_SECONDS = 30.0  # a client that reads no more is let go
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
OPEN = frozenset({"/", "/health", "/ready", *(f"/{name}" for name in PAGE)})
HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"cache-control": b"no-store",
}

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """Pure ASGI: it costs a function call per chunk.

    Args:
        app: What is guarded.
        key: Without it everybody who reaches the port may ask.
        hosts: Names that the Host header may hold, or None for any: a page of another site that had its name point
            here (DNS rebinding) sends its own.
    """

    def __init__(self, app: Any, key: str | None, hosts: frozenset[str] | None, metrics: Metrics) -> None:
        self.app, self.hosts, self.metrics = app, hosts, metrics
        self.key = _digest(f"Bearer {key}".encode()) if key else None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer, or refuse in words."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                self.metrics.requests.labels(route.path if route else "other", message["status"]).inc()
                message["headers"] = list((HEADERS | dict(message["headers"])).items())
            async with asyncio.timeout(SEND_SECONDS):
                await send(message)

        try:
            self._check(scope, headers)
            body = await self._body(headers, receive)
        except Fault as fault:
            await fault_response(fault)(scope, receive, guarded)
            return
        await self._run(scope, body, receive, guarded)

    def _check(self, scope: Message, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self.hosts is not None and re.sub(r":\d+$", "", host) not in self.hosts:
            raise Fault(421, "this name is not served here", "unknown_host")
        given = _digest(headers.get(b"authorization", b""))
        if self.key is not None and scope["path"] not in OPEN and not hmac.compare_digest(given, self.key):
            raise Fault(401, "expected the server's key: Authorization: Bearer KEY", "invalid_api_key")
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if scope["method"] == "POST" and kind != b"application/json":
            raise Fault(415, "expected content-type application/json", "unsupported_media_type")

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        body, more = bytearray(), int(headers.get(b"content-length", b"0")) <= BODY_BYTES
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more and len(body) <= BODY_BYTES:
                    message = await receive()
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
        except TimeoutError:
            raise Fault(408, f"the body did not arrive within {BODY_SECONDS:.0f} s", "timeout") from None
        if more or len(body) > BODY_BYTES or int(headers.get(b"content-length", b"0")) > BODY_BYTES:
            raise Fault(413, f"expected a body of at most {BODY_BYTES} bytes", "body_too_large")
        return bytes(body)

    async def _run(self, scope: Message, body: bytes, receive: Receive, send: Send) -> None:
        """The application, until it has answered or the client has gone."""
        parts: Iterator[Message] = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            for part in parts:
                return part
            return await asyncio.Future()  # that the client left is not for the application to notice

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        scope["body_bytes"] = len(body)
        answering, leaving = asyncio.create_task(self.app(scope, replay, send)), asyncio.create_task(gone())
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (answering, leaving):
                if not task.done():
                    task.cancel()
        with suppress(asyncio.CancelledError, TimeoutError):
            await answering


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


class TimedProtocol(H11Protocol):
    """uvicorn's protocol; whoever has not sent the head of a request in time is let go."""

    deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first head is due."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """A request began, went on, or its head is complete."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is due any more."""
        super().connection_lost(exc)
        if self.deadline:
            self.deadline.cancel()

    def _watch(self) -> None:
        due = self.cycle is None or self.cycle.response_complete
        if due and self.deadline is None:
            self.deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)
        elif not due and self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None

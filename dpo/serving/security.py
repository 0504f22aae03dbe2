"""What stands in front of the application: who may ask, how much, and for how long.

Takes any ASGI application. All is read, checked and limited here; a request ends when its client leaves.
"""

import asyncio
import hmac
import re
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from dpo.serving.app import PAGE_FILES, error_response
from dpo.serving.schema import APIError
from dpo.serving.service import REQUEST_COUNTER

MAX_BODY_BYTES = 2**20
HEAD_TIMEOUT_SECONDS = BODY_TIMEOUT_SECONDS = SEND_TIMEOUT_SECONDS = 10
LOOPBACK_HOSTS = {"localhost", "127.0.0.1", "::1", "[::1]"}
PUBLIC_PATHS = {"/", "/health", "/ready", *(f"/{name}" for name in PAGE_FILES)}
SECURITY_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"cache-control": b"no-store",
}


class RequestGuard:
    """Pure ASGI: it costs a function call per chunk.

    Without a key everybody who reaches the port may ask, but only by a name of this machine: a page of another site
    that had its name point here (DNS rebinding) sends its own.
    """

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self.app, self.expected_authorization = app, f"Bearer {key}".encode() if key else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse in words."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        app = self.app
        try:
            self._check(scope["method"], scope["path"], dict(scope["headers"]))
            unread: list[Message] = [{"type": "http.request", "body": await _body(receive)}]
        except APIError as fault:
            app, unread = error_response(fault), []

        async def replay() -> Message:
            return unread.pop() if unread else await asyncio.Future()  # that the client left is not for it to notice

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                REQUEST_COUNTER.labels(route.path if route else "other", message["status"]).inc()
                message["headers"] = list((SECURITY_HEADERS | dict(message["headers"])).items())
            await send(message)

        answering, leaving = asyncio.ensure_future(app(scope, replay, guarded)), asyncio.create_task(_left(receive))
        answering.add_done_callback(lambda _: leaving.cancel())
        leaving.add_done_callback(lambda _: answering.cancel())
        with suppress(asyncio.CancelledError):
            await answering

    def _check(self, method: str, path: str, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if not self.expected_authorization and re.sub(r":\d+$", "", host) not in LOOPBACK_HOSTS:
            raise APIError(421, "this name is not served here", "unknown_host")
        given = headers.get(b"authorization", b"")
        if (
            self.expected_authorization
            and path not in PUBLIC_PATHS
            and not hmac.compare_digest(given, self.expected_authorization)
        ):
            raise APIError(401, "expected the server's key: Authorization: Bearer KEY", "invalid_api_key")
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if method == "POST" and kind != b"application/json":
            raise APIError(415, "expected content-type application/json", "unsupported_media_type")


async def _body(receive: Receive) -> bytes:
    body, more = b"", True
    try:
        async with asyncio.timeout(BODY_TIMEOUT_SECONDS):
            while more:
                message = await receive()
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > MAX_BODY_BYTES:
                    raise APIError(413, f"expected a body of at most {MAX_BODY_BYTES} bytes", "body_too_large")
    except TimeoutError:
        raise APIError(408, f"the body did not arrive within {BODY_TIMEOUT_SECONDS:.0f} s", "timeout") from None
    return body


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class TimedProtocol(H11Protocol):
    """uvicorn's protocol, which lets go whoever sends no head or reads no reply.

    Its own time-out, between requests, is here one on the first head too, and on the whole of every head.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first head is due."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        """As it was, but that the time goes on until a head is complete."""
        self.conn.receive_data(data)
        self.handle_events()

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        self.send_timeout = self.loop.call_later(SEND_TIMEOUT_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It does."""
        super().resume_writing()
        self.send_timeout.cancel()

"""What stands between the network and the application: authentication, size limits, timeouts, security headers."""

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
HEAD_TIMEOUT_SECONDS = 10
BODY_TIMEOUT_SECONDS = 10
SEND_TIMEOUT_SECONDS = 10
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
    """ASGI middleware that checks each request, reads its body, and cancels it when the client disconnects.

    Without a key, anybody who reaches the port may send requests, but only to a host name of this machine. A foreign
    web page whose domain was made to resolve to this machine (DNS rebinding) sends its own host name. Starlette's
    TrustedHostMiddleware would refuse that with a plain-text 400; API clients get 421 and a JSON error here.

    It is plain ASGI rather than Starlette's BaseHTTPMiddleware because it runs for every chunk of a stream.

    Args:
        app: The application to protect.
        key: The key that clients must send, or None.
    """

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self.app = app
        self.expected_authorization = f"Bearer {key}".encode() if key else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the application, or refuse it with an error."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        app = self.app
        unread: list[Message] = []
        try:
            self._check(scope["method"], scope["path"], dict(scope["headers"]))
            unread.append({"type": "http.request", "body": await _read_body(receive)})
        except APIError as error:
            app = error_response(error)

        async def replay() -> Message:
            return unread.pop() if unread else await asyncio.Future()  # disconnects are handled here, not by the app

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                REQUEST_COUNTER.labels(route.path if route else "other", message["status"]).inc()
                message["headers"] = list((SECURITY_HEADERS | dict(message["headers"])).items())
            await send(message)

        response = asyncio.ensure_future(app(scope, replay, send_with_headers))
        disconnect = asyncio.create_task(_wait_for_disconnect(receive))
        response.add_done_callback(lambda _: disconnect.cancel())
        disconnect.add_done_callback(lambda _: response.cancel())
        with suppress(asyncio.CancelledError):
            await response

    def _check(self, method: str, path: str, headers: dict[bytes, bytes]) -> None:
        host = re.sub(r":\d+$", "", headers.get(b"host", b"").decode("latin-1").lower())
        if not self.expected_authorization and host not in LOOPBACK_HOSTS:
            message = "without a key, this server answers only to the host names localhost, 127.0.0.1 and [::1]"
            raise APIError(421, message, "unknown_host")
        if self.expected_authorization and path not in PUBLIC_PATHS:
            authorization = headers.get(b"authorization", b"")
            if not hmac.compare_digest(authorization, self.expected_authorization):  # takes equally long for any key
                raise APIError(401, "expected the server's key: Authorization: Bearer KEY", "invalid_api_key")
        content_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if method == "POST" and content_type != b"application/json":
            raise APIError(415, "expected content-type application/json", "unsupported_media_type")


async def _read_body(receive: Receive) -> bytes:
    body = b""
    more = True
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


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP protocol with timeouts for clients that send no request head or do not read the response.

    uvicorn applies its keep-alive timeout between requests only, and any byte resets it. Here it also applies to the
    first head of a connection, and each head must be complete within it.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout for the first head."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        """Process data as uvicorn does, but let the timeout run on until a head is complete."""
        self.conn.receive_data(data)
        self.handle_events()

    def pause_writing(self) -> None:
        """Start the timeout for a client that does not read."""
        super().pause_writing()
        self.send_timeout = self.loop.call_later(SEND_TIMEOUT_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop that timeout, as the client reads again."""
        super().resume_writing()
        self.send_timeout.cancel()

"""What is checked of a request before the application sees it: address, origin, key, size."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wispprof.openai_api.api_error import ApiError

MAX_BODY_BYTES = 8 << 20
_MAX_HELD_BYTES = 64 << 20
_WITHOUT_KEY = frozenset({"/", "/health", "/ready", "/v1/split"})
"""Paths that are open to all; edges show their key in their first frame. The page at ``/`` holds no data."""
_MONITORING = frozenset({"/metrics", "/steps"})


def bearer_key(headers: Headers) -> str:
    """The API key of a request; empty if it shows none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def invalid_key(key: str) -> ApiError:
    """The refusal of a request that shows ``key``, or none."""
    message = "Invalid API key." if key else "This server needs an API key (Authorization: Bearer KEY)."
    return ApiError(message, 401, code="invalid_api_key")


class RequestGuard:
    """ASGI middleware. The application gets a request once its whole body has arrived.

    ``monitoring_needs_key``: ``/metrics`` and ``/steps`` need a key too.
    ``accepts_key``: ``None`` if no key is needed. Only then ``Host`` and ``Origin`` must name this machine or
    one of ``allowed_hosts``: otherwise a web page could reach the API through the user's browser, by its own
    requests or by a name that it lets resolve to this machine (DNS rebinding). A page does not know a key.
    """

    def __init__(
        self,
        app: ASGIApp,
        accepts_key: Callable[[str], bool] | None = None,
        allowed_hosts: Sequence[str] = (),
        max_body_bytes: int = MAX_BODY_BYTES,
        monitoring_needs_key: bool = False,
    ) -> None:
        self._app = app
        self._open = _WITHOUT_KEY if monitoring_needs_key else _WITHOUT_KEY | _MONITORING
        self._open_parts = ("/pages/",) if monitoring_needs_key else ("/pages/", "/steps/")
        self._accepts_key = accepts_key
        self._allowed_hosts = frozenset(host.lower() for host in allowed_hosts)
        self._max_body_bytes = max_body_bytes
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        body = _Body(receive)
        try:
            headers = Headers(scope=scope)
            self._check(scope["path"], headers)
            if scope["type"] == "http" and ("content-length" in headers or "transfer-encoding" in headers):
                await self._read(body, int(headers.get("content-length", 0)))
                receive = body.replay
            if not body.disconnected:
                await self._app(scope, receive, send)
        except _Refused as err:
            await _refuse(err.reason, scope, receive, send)
        finally:
            self._held_bytes -= body.size

    def _check(self, path: str, headers: Headers) -> None:
        if self._accepts_key is not None:
            public = path in self._open or path.startswith(self._open_parts)
            key = bearer_key(headers)
            if not public and not self._accepts_key(key):
                raise _Refused(invalid_key(key))
            return
        host, origin = headers.get("host", ""), headers.get("origin")
        if host and not self._allowed(_host_name(f"//{host}")):
            raise _Refused(
                ApiError(
                    f"Without an API key only names of this machine are served, not {host[:100]!r}. "
                    "Use localhost; a server also takes --allowed-host or an API key.",
                    403,
                )
            )
        if origin is not None and not self._allowed(_host_name(origin)):
            raise _Refused(ApiError(f"Without an API key pages of {origin[:100]!r} are not served.", 403))

    def _allowed(self, name: str) -> bool:
        if name in self._allowed_hosts or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    async def _read(self, body: _Body, declared: int) -> None:
        """The whole body into memory, as far as it is allowed there."""
        if declared > self._max_body_bytes:
            raise self._too_large()
        while await body.read_some():
            self._held_bytes += body.last_size
            if body.size > self._max_body_bytes:
                raise self._too_large()
            if self._held_bytes > _MAX_HELD_BYTES:
                raise _Refused(ApiError("The server holds too many large requests.", 503, retry_ms=1_000.0))

    def _too_large(self) -> _Refused:
        return _Refused(ApiError(f"A request holds at most {self._max_body_bytes} bytes.", 413))


class _Refused(Exception):
    def __init__(self, reason: ApiError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class _Body:
    """The body of a request as it arrives, and again for the application."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._chunks: list[bytes] = []
        self._more = True
        self.size = self.last_size = 0
        self.disconnected = False

    async def read_some(self) -> bool:
        """Wait for the next chunk; false once there is none left."""
        self.last_size = 0
        if not self._more:
            return False
        message = await self._receive()
        if message["type"] != "http.request":
            self.disconnected, self._more = True, False
            return False
        chunk = message.get("body", b"")
        self._more = message.get("more_body", False)
        self.last_size = len(chunk)
        self.size += len(chunk)
        self._chunks.append(chunk)
        return True

    async def replay(self) -> Message:
        """The ASGI ``receive`` of the application."""
        if not self._chunks:
            return await self._receive()
        body = b"".join(self._chunks)
        self._chunks.clear()
        return {"type": "http.request", "body": body, "more_body": False}


def _host_name(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""


async def _refuse(reason: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = {"www-authenticate": "Bearer"} if reason.status == 401 else {}
    if reason.retry_ms:
        headers["retry-after"] = "1"
    await JSONResponse(reason.body(), reason.status, headers)(scope, receive, send)

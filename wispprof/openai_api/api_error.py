"""The error object of the OpenAI API."""

from __future__ import annotations

import re
from typing import Any

from wispprof.errors import (
    HandshakeRefused,
    RequestRefused,
    RuntimeFault,
    ServerBusy,
    ServerUnreachable,
    WispprofError,
)

_UNREACHABLE_RETRY_MS = 5_000.0
_FIELDS = {"--slo": "tokens_per_s", "--ttft": "ttft_ms"}
"""Options of commands that messages name, and what a request calls them."""
_OPTIONS = re.compile(r"(?<!\S)--(?:slo|ttft)\b")


class ApiError(WispprofError):
    """A request that failed. ``status``: its HTTP status; ``retry_ms``: when to try again (429, 503);
    ``details``: further fields of the error object."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_ms: float = 0.0,
        **details: Any,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_ms = retry_ms
        self.details = details

    @classmethod
    def of(cls, err: WispprofError) -> ApiError:
        """``err`` with the status that it has over HTTP."""
        if isinstance(err, ApiError):
            return err
        if isinstance(err, RequestRefused):
            return cls(str(err), 400, code=err.code)
        if isinstance(err, ServerBusy):
            nearest = err.nearest_tokens_per_s
            details: dict[str, Any] = {"nearest_tokens_per_s": nearest} if nearest else {}
            status = 503 if err.code == "draining" else 429
            return cls(str(err), status, code=err.code, retry_ms=err.retry_ms, **details)
        if isinstance(err, ServerUnreachable):
            return cls(str(err), 503, code="server_unreachable", retry_ms=_UNREACHABLE_RETRY_MS)
        if isinstance(err, HandshakeRefused):
            return cls(str(err), 502, code=err.code)
        return cls(str(err), 502 if isinstance(err, RuntimeFault) else 400)

    def body(self) -> dict[str, Any]:
        """The error object that OpenAI clients expect."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        default = "invalid_request_error" if self.status < 500 else "server_error"
        error = {
            "message": _OPTIONS.sub(lambda found: _FIELDS[found[0]], str(self)),
            "type": kinds.get(self.status, default),
            "param": self.param,
            "code": self.code,
        }
        return {"error": {**error, **self.details}}

    def headers(self) -> dict[str, str]:
        """When to try again, as HTTP says it."""
        if self.status not in (429, 503):
            return {}
        return {"retry-after": str(max(1, round(self.retry_ms / 1000.0)))}

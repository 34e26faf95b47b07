"""Pages in the browser, as package data: the playground of an edge, and the page of a server.

Plain HTML, CSS and JavaScript modules, without a build step. A page holds no data of the server; its script
fetches them, with the key if there is one.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""Nothing inline, nothing from other origins, no text that becomes markup."""

HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


class PageFile(NamedTuple):
    """A file as it is served."""

    data: bytes
    media_type: str
    etag: str


@cache
def page_files() -> dict[str, PageFile]:
    """Every file of the pages by its name."""
    found: dict[str, PageFile] = {}
    for entry in files(__name__).iterdir():
        kind = entry.name.rpartition(".")[2]
        if kind in _TYPES:
            data = entry.read_bytes()
            etag = f'"{hashlib.blake2b(data, digest_size=12).hexdigest()}"'
            found[entry.name] = PageFile(data, f"{_TYPES[kind]}; charset=utf-8", etag)
    return found


def add_page(app: FastAPI, name: str) -> None:
    """Serve ``name`` at ``/``, and what the pages are made of below ``/pages/``."""

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return _answer(request, f"{name}.html")

    @app.get("/pages/{file}", include_in_schema=False)
    async def part(request: Request, file: str) -> Response:
        return _answer(request, file)


def _answer(request: Request, name: str) -> Response:
    found = page_files().get(name)
    if found is None:
        return Response("There is no such file.", 404, HEADERS, "text/plain")
    headers = HEADERS | {"etag": found.etag}
    if request.headers.get("if-none-match") == found.etag:
        return Response(None, 304, headers)
    return Response(found.data, 200, headers, found.media_type)

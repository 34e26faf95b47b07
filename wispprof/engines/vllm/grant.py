"""What one request may do in the next step."""

from __future__ import annotations

from typing import Any, NamedTuple


class Grant(NamedTuple):
    """One request's share of the next step: ``new`` tokens it knows, then ``drafts``. ``announce``: the
    workers have not seen the request, or its tokens changed since."""

    request: Any
    new: int
    drafts: list[int]
    announce: bool

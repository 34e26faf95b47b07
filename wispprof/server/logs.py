"""JSON log lines on stderr, few of a kind."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime

_LOGGERS = ("wispprof", "uvicorn.error", "asyncio")
BURST = 20
WINDOW_S = 10.0


class JsonLines(logging.Formatter):
    """``{"at": …, "level": …, "from": …, "message": …}``, and ``trace`` for an exception."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "from": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class RateLimit(logging.Filter):
    """At most :data:`BURST` lines of one source line in :data:`WINDOW_S`. The first after that says how many
    were left out, so a hostile client cannot fill the disk."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._now_s = now_s
        self._windows: dict[tuple[str, int], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        source = (record.pathname, record.lineno)
        now_s = self._now_s()
        since_s, count = self._windows.get(source, (now_s, 0))
        if now_s - since_s >= WINDOW_S:
            if count > BURST:
                record.msg = f"{record.msg} ({count - BURST} more such lines were left out)"
            since_s, count = now_s, 0
        self._windows[source] = (since_s, count + 1)
        return count < BURST


def configure_logging(level: str, quiet: bool = False) -> None:
    """Log JSON lines to stderr, the web server's warnings among them. ``quiet``: warnings only, for a
    dashboard that owns the screen."""
    levels = {"debug", "info", "warning", "error"}
    if level not in levels:
        raise ValueError(f"log level must be one of {', '.join(sorted(levels))}, got {level!r}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    handler.addFilter(RateLimit())
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        own = name == "wispprof" and not quiet
        logger.setLevel(level.upper() if own else logging.WARNING)

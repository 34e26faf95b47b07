"""Logs as one JSON object per line on stderr, so that machines can read them and people still can."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

__all__ = ["JsonLines", "configure_logging"]


class JsonLines(logging.Formatter):
    """``{"at": …, "level": …, "from": …, "message": …}``, with ``trace`` where there is one."""

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


def configure_logging(level: str, quiet: bool = False) -> None:
    """Send the server's own log to stderr. ``quiet`` keeps only warnings (a live view has the screen)."""
    names = {"debug", "info", "warning", "error"}
    if level not in names:
        raise ValueError(f"log level must be one of {', '.join(sorted(names))}, got {level!r}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("wispprof")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.WARNING if quiet else level.upper())

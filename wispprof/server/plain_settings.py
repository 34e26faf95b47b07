"""Settings of a server on their way to another process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from wispprof.settings.server_settings import ServerSettings


def plain_settings(settings: ServerSettings) -> dict[str, Any]:
    """Settings in plain types."""
    plain: dict[str, Any] = msgspec.to_builtins(settings, enc_hook=str)
    return plain


def read_settings(plain: dict[str, Any]) -> ServerSettings:
    """Settings from plain types."""
    return msgspec.convert(plain, ServerSettings, dec_hook=_path)


def _path(kind: type, value: object) -> object:
    return Path(str(value)) if issubclass(kind, Path) else value

"""How a verification server is set up. Frozen; the command line takes its defaults from here."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wispprof.errors import WispprofError

__all__ = ["ServerSettings", "read_api_keys"]


@dataclass(frozen=True)
class ServerSettings:
    """Everything ``wispprof serve`` can be told. Durations in ms, sizes in tokens.

    ``target``: folder or hub id; ``target_id``: the name edges ask for (its last part by default).
    ``estimator`` and ``plan``: files; without an estimator the server calibrates itself. ``step_log``: file
    that every step's shape and time are appended to, for ``wispprof fit --update``.
    ``tensor_parallel``: processes that share the target, see :mod:`wispprof.server.rank_server`.
    ``max_drafts``: most drafts held per session, the lead an edge may take.
    ``kv_tokens``: size of the KV cache, 0 lets the engine choose. ``max_waiting``: requests that may
    wait for memory. ``kept_sessions``: ended or lost sessions whose KV stays for reuse.
    ``idle_ttl_ms``: a session whose edge is silent that long is released; ``idle_evict_ms``: after that long
    its KV may be taken by others if memory is short (it is prefilled again with its next round).
    ``admit``: ``slo`` refuses what the estimator says cannot be kept, ``all`` refuses nothing for its SLO.
    ``http_tokens_per_s`` and ``http_max_tokens``: what an HTTP request gets that names none.
    ``backlog_frames``: frames a slow reader may leave unread before its connection is closed.
    ``coalesce_ms``: how long frames may lie unread while the engine computes; 0 reads each at once.
    """

    target: str = ""
    target_id: str = ""
    estimator: Path | None = None
    plan: Path | None = None
    step_log: Path | None = None
    policy: str = "wispprof"
    policy_options: dict[str, Any] = field(default_factory=dict)

    host: str = "127.0.0.1"
    port: int = 8200
    api_keys: tuple[str, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None

    device: str = "auto"
    dtype: str = "float32"
    backend: str = "auto"
    tensor_parallel: int = 1
    kv_tokens: int = 0

    max_items: int = 64
    max_tokens: int = 1024
    prefill_chunk: int = 256
    max_drafts: int = 32

    max_sessions: int = 1024
    max_waiting: int = 256
    sessions_per_key: int = 1024
    tokens_per_key_per_s: float = 0.0
    max_prompt: int = 0
    max_new: int = 4096
    admit: str = "slo"
    admit_load: float = 0.9
    kept_sessions: int = 64
    keep_ttl_ms: float = 300_000.0
    idle_ttl_ms: float = 600_000.0
    idle_evict_ms: float = 2_000.0

    http_tokens_per_s: float = 1.0
    http_max_tokens: int = 256
    hello_timeout_ms: float = 5_000.0
    backlog_frames: int = 1024
    coalesce_ms: float = 8.0
    drain_timeout_ms: float = 30_000.0
    live: bool = False
    log_level: str = "info"

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536 and self.port != 0:
            raise ValueError(f"port must be 0 … 65535, got {self.port}")
        if self.admit not in ("slo", "all"):
            raise ValueError(f"admit must be slo or all, got {self.admit!r}")
        for name in (
            "max_items",
            "max_tokens",
            "prefill_chunk",
            "max_sessions",
            "max_drafts",
            "tensor_parallel",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.coalesce_ms < 0.0:
            raise ValueError(f"coalesce_ms must not be negative, got {self.coalesce_ms}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise WispprofError(
                "TLS needs a certificate and its key.", "Give both --tls-cert and --tls-key."
            )
        if not self.loopback and not self.api_keys:
            raise WispprofError(
                f"Refusing to listen on {self.host} without an API key.",
                "Give --api-key-file, or listen on 127.0.0.1.",
            )

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def read_api_keys(path: Path) -> tuple[str, ...]:
    """Keys of a file, one per line; empty lines and ``#`` comments are skipped.

    Raises :class:`WispprofError` where the file holds none, or a short one, or cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        reason = err.strerror if isinstance(err, OSError) else "it is not UTF-8 text"
        raise WispprofError(
            f"The keys in {path} cannot be read: {reason}.", "Write one key per line into it."
        ) from err
    lines = [line.strip() for line in text.splitlines()]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise WispprofError(f"{path} holds no API key.", "Write one key per line into it.")
    short = [key for key in keys if len(key) < 16]
    if short:
        raise WispprofError(
            f"{path} holds a key of {len(short[0])} characters.",
            "Use at least 16, for example from `openssl rand -hex 24`.",
        )
    return keys

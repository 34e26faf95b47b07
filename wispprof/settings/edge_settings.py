"""Frozen settings of an edge: how it connects, and how far it drafts."""

from __future__ import annotations

from dataclasses import dataclass

from wispprof.sessions.draft_scheduler import DraftingSettings

__all__ = ["ClientSettings", "DraftingSettings"]


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """How an edge connects.

    ``tokenizer`` and ``target`` are checked by the server at hello (empty accepts what it has).
    Reconnecting waits ``backoff_ms``, doubled up to ``backoff_max_ms``, each time multiplied by a random
    factor in ``1 ± backoff_jitter``; a connection that stays away for ``give_up_ms`` is an error.
    ``ping_ms``: interval of link measurements; a link that delivered nothing for ``dead_ms`` although
    something was asked counts as lost. ``offline_ok``: entering without a server is no error yet.
    ``rtt_guess_ms`` stands in until the first measurement.
    """

    tokenizer: str = ""
    target: str = ""
    key: str = ""
    name: str = ""
    hello_ms: float = 5000.0
    backoff_ms: float = 100.0
    backoff_max_ms: float = 2000.0
    backoff_jitter: float = 0.5
    give_up_ms: float = 30_000.0
    ping_ms: float = 2000.0
    dead_ms: float = 10_000.0
    rtt_guess_ms: float = 30.0
    offline_ok: bool = False

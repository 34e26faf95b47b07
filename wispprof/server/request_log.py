"""The request log: one JSON line for each request that ended, for ``wispprof traffic``.

It is anonymous: lengths, times and counts, no texts, keys or addresses.

| entry | meaning |
|---|---|
| ``arrival_s`` | Unix time of the request |
| ``prompt``, ``output`` | tokens |
| ``tokens_per_s``, ``ttft_ms`` | its SLO; absent if it asked for none |
| ``prefix`` | salted ids of the prompt's whole blocks of 512 tokens: equal ids, equal text up to there |
| ``rtt_ms`` | least time from a commit to the drafts that answer it, less their drafting; absent if unseen |
| ``drafted``, ``accepted`` | by depth d, from 1: rounds with drafts verified to depth d, and accepted |
| ``end`` | why it ended |
| ``resumed`` | output tokens that an earlier session of the same request had committed; absent if none |

The salt is random, changes with every start and is written nowhere.
"""

from __future__ import annotations

import math
import secrets
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from wispprof.server.line_log import LineLog
from wispprof.sessions.session_state import SessionState
from wispprof.simulation.arrivals import BLOCK_TOKENS

MAX_BYTES = 64 << 20
MAX_DEPTH = 16
_ID_BYTES = 6


@dataclass(slots=True)
class DepthCounts:
    """Rounds by depth, from 1 on: with so many drafts verified, and with so many accepted."""

    drafted: list[int] = field(default_factory=lambda: [0] * MAX_DEPTH)
    accepted: list[int] = field(default_factory=lambda: [0] * MAX_DEPTH)

    def add(self, drafted: int, accepted: int) -> None:
        for depth in range(min(drafted, MAX_DEPTH)):
            self.drafted[depth] += 1
        for depth in range(min(accepted, MAX_DEPTH)):
            self.accepted[depth] += 1


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """What a line is made of. ``owner``: whose prefixes it may share; never written."""

    state: SessionState
    depths: DepthCounts
    resumed: int
    owner: str
    end: str


class RequestLog(LineLog[EndedRequest]):
    """Lines as in the module's table, in two files of at most 64 MiB: ``path``, and before it ``path`` with
    ``.1``. ``unix_ms`` turns a time of the server's clock into Unix time."""

    name = "request log"

    def __init__(self, path: Path, unix_ms: Callable[[float], float], max_bytes: int = MAX_BYTES) -> None:
        self._unix_ms = unix_ms
        self._salt = secrets.token_bytes(32)
        super().__init__(path, max_bytes)

    def encode(self, record: EndedRequest) -> dict[str, Any]:
        state, depths = record.state, record.depths
        prompt = len(state.tokens) - state.generated
        slo, rtt_ms = state.slo, state.drafts.arrivals.rtt_ms
        deepest = max((d for d, n in enumerate(depths.drafted, start=1) if n), default=0)
        line: dict[str, Any] = {
            "arrival_s": round(self._unix_ms(state.slo_tracker.opened_ms) / 1000.0, 3),
            "prompt": prompt,
            "output": state.generated,
            "prefix": block_ids(state.tokens[:prompt], record.owner, self._salt),
            "drafted": depths.drafted[:deepest],
            "accepted": depths.accepted[:deepest],
            "end": record.end,
        }
        if not slo.best_effort:
            line["tokens_per_s"] = slo.tokens_per_s
        if slo.ttft_ms is not None:
            line["ttft_ms"] = slo.ttft_ms
        if math.isfinite(rtt_ms):
            line["rtt_ms"] = round(rtt_ms, 2)
        if record.resumed:
            line["resumed"] = record.resumed
        return line


def block_ids(tokens: Sequence[int], owner: str, salt: bytes) -> list[int]:
    """Ids of the whole blocks of a prompt; each depends on all tokens up to its end, and on the owner."""
    ids, digest = [], owner.encode()
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = array("q", tokens[start : start + BLOCK_TOKENS]).tobytes()
        digest = blake2b(digest + block, digest_size=32, key=salt).digest()
        ids.append(int.from_bytes(digest[:_ID_BYTES]))
    return ids

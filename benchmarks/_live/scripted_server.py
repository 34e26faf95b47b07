"""A server whose engine sleeps for a fixed time and looks its answers up.

    python -m _live.scripted_server STEP_MS MAX_ITEMS OUTPUT

It prints its port, serves until SIGTERM, and writes what its engine saw to OUTPUT: start, end and items of
each step, and (edge, committed length, end of the step) of each commit.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _live.scripted_text import MAX_CONTEXT, VOCAB, text
from wispprof.server import serve
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeEngine
from wispprof.types import Sampling, StepInput, VerifyResult


class ScriptedEngine(FakeEngine):
    """Takes ``period_ms`` a step, its own work included. The first prompt token names the edge."""

    def __init__(self, period_ms: float) -> None:
        super().__init__(VOCAB, max_context=MAX_CONTEXT, kv_tokens=1 << 30)
        self.period_s = period_ms / 1000.0
        self.steps: list[tuple[float, float, int]] = []
        self.commits: list[tuple[int, int, float]] = []
        self._edges: dict[str, int] = {}
        self._lengths: dict[str, int] = {}

    @property
    def kv_free(self) -> int:
        return self.kv_tokens

    @property
    def sessions(self) -> tuple[str, ...]:
        return tuple(self._lengths)

    def open(self, session: str, sampling: Sampling, tokens: Sequence[int] = (), owner: str = "") -> None:
        self._edges[session], self._lengths[session] = tokens[0], 0

    def step(self, inputs: Sequence[StepInput]) -> list[VerifyResult]:
        begin = time.monotonic()
        end = begin + self.period_s
        edges, lengths = self._edges, self._lengths
        results = []
        for name, tokens, drafts, needs_logits, *_ in inputs:
            edge, fed = edges[name], len(tokens) - drafts
            start = lengths[name] + fed
            accepted = 0
            if needs_logits:
                right = text(edge, start, start + drafts + 1)
                while accepted < drafts and tokens[fed + accepted] == right[accepted]:
                    accepted += 1
                results.append(VerifyResult(name, accepted, tuple(right[: accepted + 1])))
                self.commits.append((edge, start + accepted + 1, end))
            else:
                results.append(VerifyResult(name, 0, ()))
            lengths[name] = start + accepted
        time.sleep(max(0.0, end - time.monotonic()))
        self.steps.append((begin, time.monotonic(), len(inputs)))
        return results

    def rollback(self, session: str, length: int) -> None:
        self._lengths[session] = length

    def close(self, session: str) -> None:
        del self._lengths[session], self._edges[session]

    def cached(self, session: str) -> int:
        return self._lengths[session]


def main() -> None:
    engine = ScriptedEngine(float(sys.argv[1]))
    items, output = int(sys.argv[2]), Path(sys.argv[3])
    settings = ServerSettings(
        port=0,
        max_items=items,
        max_tokens=16 * items,
        max_waiting=1024,
        admit="all",
        prefix_cache_sessions=0,
        log_level="error",
    )

    def announce(_: Any, port: int) -> None:
        print(port, flush=True)

    serve(settings, announce, engine=engine, model=engine.served)
    output.write_text(json.dumps({"steps": engine.steps, "commits": engine.commits}))


if __name__ == "__main__":
    main()

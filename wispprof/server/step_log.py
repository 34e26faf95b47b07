"""The step log: every step's shape and time as a JSON line, for ``wispprof fit --update``."""

from __future__ import annotations

from typing import Any

from wispprof.artifacts.plan import BatchRow
from wispprof.server.line_log import LineLog
from wispprof.types import BatchShape, VerifyItem

_Step = tuple[tuple[VerifyItem, ...], float, float, str]


class StepLog(LineLog[_Step]):
    """Lines ``{"shape": [[new, cached, prefill], …], "ms": x}``, with the predicted ``p50_ms`` and the plan's
    ``row`` if they are known."""

    name = "step log"

    def append(
        self,
        shape: BatchShape,
        actual_ms: float,
        p50_ms: float = 0.0,
        row: BatchRow | None = None,
    ) -> None:
        """Queue a step; never blocks."""
        self.put((shape.items, actual_ms, p50_ms, "" if row is None else row.cell))

    def encode(self, record: _Step) -> dict[str, Any]:
        items, actual_ms, p50_ms, row = record
        shape = [[item.new, item.cached, int(item.prefill)] for item in items]
        line: dict[str, Any] = {"shape": shape, "ms": round(actual_ms, 4)}
        if p50_ms > 0:
            line["p50_ms"] = round(p50_ms, 4)
        if row:
            line["row"] = row
        return line

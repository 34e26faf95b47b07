"""The step log: every step's shape and time as a JSON line, for ``wispprof fit --update``.

A thread of its own writes the lines, so that a slow disk delays no session.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from pathlib import Path
from typing import Any

from wispprof.artifacts.plan import BatchRow
from wispprof.errors import WispprofError
from wispprof.types import BatchShape, VerifyItem

log = logging.getLogger("wispprof.server")

_MAX_QUEUED = 100_000
"""Steps that may wait for a blocked disk; later ones are dropped and counted."""

_Step = tuple[tuple[VerifyItem, ...], float, float, str]


class StepLog:
    """Appends ``{"shape": [[new, cached, prefill], …], "ms": x}`` lines to ``path``, with the predicted
    ``p50_ms`` and the plan's ``row`` if they are known.

    A disk error ends the log, not the server; :attr:`error` holds it. Raises :class:`WispprofError` if
    the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.written = 0
        self.dropped = 0
        self.error = ""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", buffering=1, encoding="utf-8")
        except OSError as err:
            raise WispprofError(
                f"The step log {self.path} cannot be opened: {err.strerror}.",
                "Give --step-log a file that can be written.",
            ) from err
        self._queue: queue.SimpleQueue[_Step | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="step log", daemon=True)
        self._thread.start()

    def append(
        self,
        shape: BatchShape,
        actual_ms: float,
        p50_ms: float = 0.0,
        row: BatchRow | None = None,
    ) -> None:
        """Queue a step; never blocks."""
        if self.error or self._queue.qsize() >= _MAX_QUEUED:
            self.dropped += 1
            return
        self._queue.put((shape.items, actual_ms, p50_ms, "" if row is None else row.cell))

    def close(self) -> None:
        """Write what is queued and close the file. Blocks on the disk; idempotent."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _write(self) -> None:
        try:
            with self._file:
                while (step := self._queue.get()) is not None:
                    self._file.write(_line(step))
                    self.written += 1
        except OSError as err:
            self.error = err.strerror or str(err)
            log.error("the step log %s ended: %s", self.path, self.error)


def _line(step: _Step) -> str:
    items, actual_ms, p50_ms, row = step
    shape = [[item.new, item.cached, int(item.prefill)] for item in items]
    record: dict[str, Any] = {"shape": shape, "ms": round(actual_ms, 4)}
    if p50_ms > 0:
        record["p50_ms"] = round(p50_ms, 4)
    if row:
        record["row"] = row
    return json.dumps(record, separators=(",", ":")) + "\n"

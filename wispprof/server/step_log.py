"""The step log: every step's shape and time as a JSON line, for ``wispprof fit --update``.

The step loop hands a step over and goes on; a thread of its own turns it into text and writes it, so that
a slow disk costs no session anything.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from pathlib import Path
from typing import Any

from wispprof.artifacts.plan import BatchRow
from wispprof.errors import WispprofError
from wispprof.types import BatchShape, VerifyItem

__all__ = ["StepLog"]

log = logging.getLogger("wispprof.server")

_MAX_QUEUED = 100_000
"""Steps that may wait for a disk that hangs; beyond, steps are left out and counted."""

_Step = tuple[tuple[VerifyItem, ...], float, float, str]


class StepLog:
    """Appends ``{"shape": [[new, cached, prefill], …], "ms": x}`` lines to ``path``, with ``p50_ms`` as it
    was predicted and the plan's ``row`` that bounded the step, where they are known.

    What was handed over is on disk after ``flush_s`` at the latest, and after :meth:`close`. A disk that
    fails ends the log, not the server: :attr:`err` says why, and so does the server's own log.
    Raises :class:`WispprofError` where the file cannot be opened.
    """

    def __init__(self, path: Path, flush_s: float = 1.0) -> None:
        self.path = Path(path)
        self.written = 0
        self.dropped = 0
        self.err = ""
        self._flush_s = flush_s
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as err:
            raise WispprofError(
                f"The step log {self.path} cannot be opened: {err.strerror}.",
                "Give --step-log a file that can be written.",
            ) from err
        self._queue: queue.SimpleQueue[_Step | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="step log", daemon=True)
        self._thread.start()

    def note(
        self,
        shape: BatchShape,
        actual_ms: float,
        p50_ms: float = 0.0,
        row: BatchRow | None = None,
    ) -> None:
        """Take a step; never waits."""
        if self.err or self._queue.qsize() >= _MAX_QUEUED:
            self.dropped += 1
            return
        self._queue.put((shape.items, actual_ms, p50_ms, "" if row is None else row.cell))

    def close(self) -> None:
        """Write what is left and close the file. Waits for the disk. Idempotent."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _write(self) -> None:
        try:
            with self._file:
                self._drain()
        except OSError as err:
            self.err = err.strerror or str(err)
            log.error("the step log %s ended: %s", self.path, self.err)

    def _drain(self) -> None:
        dirty_s: float | None = None
        while True:
            wait = None if dirty_s is None else max(0.0, dirty_s + self._flush_s - time.monotonic())
            try:
                step = self._queue.get(timeout=wait)
            except queue.Empty:
                self._file.flush()
                dirty_s = None
                continue
            if step is None:
                return
            self._file.write(_line(step))
            self.written += 1
            now = time.monotonic()
            dirty_s = now if dirty_s is None else dirty_s
            if now >= dirty_s + self._flush_s:
                self._file.flush()
                dirty_s = None


def _line(step: _Step) -> str:
    items, actual_ms, p50_ms, row = step
    record: dict[str, Any] = {
        "shape": [[item.new, item.cached, int(item.prefill)] for item in items],
        "ms": round(actual_ms, 4),
    }
    if p50_ms > 0:
        record["p50_ms"] = round(p50_ms, 4)
    if row:
        record["row"] = row
    return json.dumps(record, separators=(",", ":")) + "\n"

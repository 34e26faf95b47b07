"""A file of JSON lines that grows while serving. A thread of its own writes, so that a slow disk delays no
session."""

from __future__ import annotations

import json
import logging
import queue
import threading
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from wispprof.errors import WispprofError

log = logging.getLogger("wispprof.server")

_MAX_QUEUED = 100_000
"""Records that may wait for a blocked disk; later ones are dropped and counted."""

Record = TypeVar("Record")


class LineLog(Generic[Record]):
    """Appends what :meth:`encode` makes of each record to ``path``. Once the file holds ``max_bytes`` (0: no
    limit) it is renamed to ``path`` with ``.1``, in place of the last one so named.

    An error ends the log, not the server; :attr:`error` holds it. Raises :class:`WispprofError` if
    the file cannot be opened. ``name``: as in the option that asks for it.
    """

    name: ClassVar[str]

    def __init__(self, path: Path, max_bytes: int = 0) -> None:
        self.path = Path(path)
        self.written = 0
        self.dropped = 0
        self.error = ""
        self._max_bytes = max_bytes
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as err:
            raise WispprofError(
                f"The {self.name} {self.path} cannot be opened: {err.strerror}.",
                f"Give --{self.name.replace(' ', '-')} a file that can be written.",
            ) from err
        self._queue: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name=self.name, daemon=True)
        self._thread.start()

    def encode(self, record: Record) -> dict[str, Any]:
        """The JSON object of a record; runs in the log's thread."""
        raise NotImplementedError

    def put(self, record: Record) -> None:
        """Queue a record; never blocks."""
        if self.error or self._queue.qsize() >= _MAX_QUEUED:
            self.dropped += 1
            return
        self._queue.put(record)

    def close(self) -> None:
        """Write what is queued and close the file. Blocks on the disk; idempotent."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _open(self) -> None:
        self._file = self.path.open("a", buffering=1, encoding="utf-8")
        self._bytes = self._file.tell()

    def _write(self) -> None:
        try:
            try:
                while (record := self._queue.get()) is not None:
                    line = json.dumps(self.encode(record), separators=(",", ":")) + "\n"
                    if self._max_bytes and self._bytes + len(line) > self._max_bytes:
                        self._file.close()
                        self.path.replace(self.path.with_name(f"{self.path.name}.1"))
                        self._open()
                    self._file.write(line)
                    self._bytes += len(line)
                    self.written += 1
            finally:
                self._file.close()
        except Exception as err:
            self.error = getattr(err, "strerror", None) or str(err)
            log.error("the %s %s ended: %s", self.name, self.path, self.error)

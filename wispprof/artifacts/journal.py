"""The journal of a running sweep: each measurement block is on disk before the next one starts.

The first line is a header that a resumed sweep must match. Then follows one sealed row per block, with an
order of its own. On resume, a torn last line is dropped; other damage is an error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wispprof.artifacts import files
from wispprof.artifacts.manifest import PROFILE_SCHEMA
from wispprof.artifacts.rows import Row, decode_row, encode_row, open_line, seal_line
from wispprof.errors import ArtifactDamaged, ArtifactError

FORMAT = "wispprof/journal"


def check_no_rows(path: Path) -> None:
    """Raise :class:`ArtifactError` if a sweep left its journal here."""
    if path.is_file() and path.stat().st_size > 0:
        raise ArtifactError(
            f"{path} holds rows of an unfinished sweep.",
            "Go on with --resume, or start over with --overwrite.",
        )


class RowJournal:
    """Append-only rows of one sweep. Use as a context manager.

    ``header`` identifies the sweep (model, grid, seed, engine, hardware). With ``resume`` an existing
    journal is continued: ``rows`` then holds what it had, and a different header raises
    :class:`ArtifactError`. Without ``resume`` an existing journal raises too, unless ``overwrite``
    discards it.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        header: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.kind = kind
        self.rows: list[Row] = []
        first = seal_line({"format": FORMAT, "schema": PROFILE_SCHEMA, "kind": kind, "header": dict(header)})
        files.regular_file(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        try:
            self._lock()
            exists = self.path.stat().st_size > 0
            if not resume and not overwrite:
                check_no_rows(self.path)
            if not exists or not resume or not self._recover(first):
                self._file.truncate(0)
                self._write(first)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        """Keep other processes from writing until this one closes the file or ends (not on Windows)."""
        if sys.platform == "win32":
            return
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            removed = os.fstat(self._file.fileno()).st_nlink == 0  # its writer has just finished
        except BlockingIOError:
            removed = True
        if removed:
            raise ArtifactError(
                f"Another process is writing {self.path}.", "Wait for it to end, or choose another --out."
            )

    def append(self, row: Row) -> None:
        """Add a finished row, which is on disk when this returns. Raises ValueError after :meth:`close`."""
        self._write(encode_row(row))
        self.rows.append(row)

    def _write(self, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """Close and delete: the rows have become a profile."""
        self.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> RowJournal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _recover(self, first: bytes) -> bool:
        """Read the rows, and cut off a torn end; whether the journal had a header."""
        data = files.read_bytes(self.path, "journal")
        end = data.rfind(b"\n") + 1  # what follows the last newline was torn off by a crash
        lines = data[:end].splitlines(keepends=True)
        if not lines:
            return False
        if lines[0] != first:
            open_line(lines[0], f"{self.path} line 1")
            raise ArtifactError(
                f"{self.path} belongs to another sweep: model, grid, settings or machine differ.",
                "Repeat the first command's options, or start over with --overwrite.",
            )
        for number, line in enumerate(lines[1:], start=2):
            row = decode_row(line, self.kind, f"{self.path} line {number}")
            if self.rows and row.order <= self.rows[-1].order:
                raise ArtifactDamaged(
                    f"{self.path} line {number}: row {row.order} stands after row "
                    f"{self.rows[-1].order}; a line was repeated or moved.",
                    "Start over with --overwrite.",
                )
            self.rows.append(row)
        if end < len(data):
            self._file.truncate(end)
        return True


def journal_header(path: Path) -> dict[str, Any]:
    """The header of a journal; empty if there is no journal or a crash tore its first line."""
    if not path.exists():
        return {}
    first, end, _ = files.read_bytes(path, "journal").partition(b"\n")
    header = open_line(first, f"{path} line 1").get("header") if end else None
    return dict(header) if isinstance(header, dict) else {}

"""Bytes on disk: whole or not at all, hashed, and never trusted when read back.

Everything this package writes goes through :func:`write_atomic`; everything it reads is plain JSON,
parsed strictly. Nothing is ever unpickled or evaluated.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from wispprof.errors import ArtifactDamaged, ArtifactMissing

__all__ = ["canonical_json", "content_hash", "parse_json", "read_bytes", "write_atomic"]


def content_hash(data: bytes) -> str:
    """``blake2b:`` and 32 hex digits (16 bytes): identifies content, guards against accidents."""
    return "blake2b:" + hashlib.blake2b(data, digest_size=16).hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` holds either what it held before or all of it.

    A temporary file beside it is flushed to the disk and renamed over it. Missing parent folders are
    made. Raises OSError where the disk refuses; nothing half-written remains.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp makes files that only the owner may read
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, on systems where folders can be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_bytes(path: Path, what: str, hint: str = "Check the path.") -> bytes:
    """The file's content, or :class:`ArtifactMissing` that says ``what`` was looked for."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ArtifactMissing(f"No {what} at {path}.", hint) from None
    except OSError as err:
        raise ArtifactMissing(f"Cannot read {what} {path}: {err.strerror}.", hint) from err


def canonical_json(value: Any) -> bytes:
    """One byte string per value: sorted keys, no spaces, UTF-8. Takes numpy numbers and arrays.

    Raises ValueError for NaN and infinities, which are not JSON: write ``None`` where a number is
    unknown or unbounded.
    """
    text = json.dumps(
        value,
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
        allow_nan=False,
        default=plain,
    )
    return text.encode()


def plain(value: object) -> object:
    """Numpy values as Python's own, for ``json.dumps(default=…)``."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} does not go into a JSON artifact")


def parse_json(data: bytes, where: str) -> Any:
    """Parse strict JSON; raises :class:`ArtifactDamaged` naming ``where``, line and fault."""
    try:
        return json.loads(data.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as err:
        raise ArtifactDamaged(
            f"{where} is not text: byte {err.start} is not UTF-8.", "Restore it or make it anew."
        ) from None
    except json.JSONDecodeError as err:
        raise ArtifactDamaged(
            f"{where} is not whole JSON: line {err.lineno}, column {err.colno}: {err.msg}.",
            "Restore it or make it anew.",
        ) from None
    except (ValueError, RecursionError) as err:
        raise ArtifactDamaged(
            f"{where} is not valid JSON: {err}.", "Restore it or make it anew."
        ) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")

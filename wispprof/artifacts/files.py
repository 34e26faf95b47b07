"""Files on disk: written atomically, hashed, and checked when read; and the files that ship with the package.

All files are JSON, parsed strictly. Nothing is ever unpickled or evaluated.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy as np

from wispprof.errors import ArtifactDamaged, ArtifactError, ArtifactMissing

try:
    from msgspec import Meta as Meta
except ModuleNotFoundError:  # profile-server only writes, and runs on images without msgspec
    Meta = dict  # type: ignore[assignment, misc]

PACKAGE = Path(__file__).resolve().parent.parent


def content_hash(data: bytes) -> str:
    """``blake2b:`` and 32 hex digits (16 bytes): identifies content, guards against accidents."""
    return "blake2b:" + hashlib.blake2b(data, digest_size=16).hexdigest()


def regular_file(path: Path) -> Path:
    """The file that writing to ``path`` replaces: symbolic links are followed and stay.

    Raises :class:`ArtifactError` for a device, a pipe or a folder, which no file may replace.
    """
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as err:  # links that lead to one another
        raise ArtifactError(f"Cannot write to {path}: {err}.", "Choose another place.") from None
    if target.exists() and not target.is_file():
        kind = "is a folder" if target.is_dir() else "is not a regular file"
        raise ArtifactError(f"{path} {kind}.", "Name a file to write.")
    return target


def check_writable(path: Path) -> None:
    """Raise what :func:`write_atomic` would raise for this place, before the work that it is for."""
    folder = next(folder for folder in regular_file(path).parents if folder.exists())
    with _naming(path), tempfile.TemporaryFile(dir=folder):
        pass


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of the system name ``path``, not the temporary file beside it."""
    try:
        yield
    except OSError as err:
        if err.errno is None:
            raise
        raise OSError(err.errno, err.strerror, str(path)) from err


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` holds either what it held before or all of it.

    A temporary file beside it is flushed to the disk and renamed over it. Missing parent folders are
    made. Raises :class:`ArtifactError` as :func:`regular_file` does, and OSError if the disk refuses;
    nothing half-written remains.
    """
    with _naming(path):
        _write_atomic(regular_file(path), data)


def _write_atomic(path: Path, data: bytes) -> None:
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
    # The rename survives a power cut, on systems where folders can be opened.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


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
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=plain
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
        raise ArtifactDamaged(f"{where} is not valid JSON: {err}.", "Restore it or make it anew.") from None


def convert(value: object, kind: Any, where: str, hint: str = "Restore it or make it anew.") -> Any:
    """``value``, parsed from JSON, as a value of type ``kind``.

    Raises :class:`ArtifactDamaged` naming ``where``, the field that does not fit, and its value.
    """
    import msgspec

    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, OverflowError) as err:
        raise ArtifactDamaged(f"{where}: {_named_fault(value, str(err))}.", hint) from None


def _named_fault(value: Any, err: str) -> str:
    """Turn "Expected … - at `$.rows[2].k`" into "rows[2].k is 'x': expected …"."""
    message, at, path = err.partition(" - at `$")
    if not at or message.startswith("Object"):
        return err
    for key, index in re.findall(r"\.(\w+)|\[(\d+)\]", path):
        value = value[key] if key else value[int(index)]
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "…"
    return f"{path.strip('.`')} is {shown}: {message[0].lower()}{message[1:]}"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def bundle_roots() -> tuple[Path, ...]:
    """Folders of shipped files, in order: the wheel's ``_bundled``, then the checkout's root."""
    # site-packages may hold a stranger's ``models`` folder: only a real checkout counts.
    checkout = PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else None
    return (PACKAGE / "_bundled", *([checkout] if checkout else []))


def bundled_path(relative: str) -> Path:
    """Find a shipped file or folder, such as ``profiles/rpi-5.jsonl``.

    ``relative`` uses forward slashes and may not leave the shipped folders (ValueError).
    Raises :class:`ArtifactMissing` if this installation does not hold it.
    """
    parts = PurePosixPath(relative)
    if parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"bundled paths are relative to the package's own files, got {relative!r}")
    for root in bundle_roots():
        candidate = root.joinpath(*parts.parts)
        if candidate.exists():
            return candidate
    looked = " or ".join(str(root) for root in bundle_roots())
    raise ArtifactMissing(
        f"This installation does not hold {relative} (looked in {looked}).",
        "Install a complete wheel or checkout, or name your own file instead.",
    )


def bundled_model(role: str) -> str:
    """Folder of the shipped reference pair's ``target`` or ``draft``."""
    return str(bundled_path(f"models/reference-pair/{role}"))

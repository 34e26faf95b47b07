"""A C source as a shared library, compiled for this processor on first use and kept in the cache folder.

What lies there is code: a folder or file that others may write to is not used. Without a safe folder, as for
a user without a home, each process compiles for itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from wispprof.artifacts.files import write_atomic

_FLAGS = ("-O3", "-fno-fast-math", "-fPIC", "-shared", "-fopenmp")
_ASK_S, _COMPILE_S = 10.0, 60.0


class NotBuilt(Exception):
    """Why there is no library, as a clause for a message."""


def load(source: Path) -> ctypes.CDLL:
    """The library of a C source. Raises :class:`NotBuilt`."""
    if os.name != "posix":
        raise NotBuilt("it is compiled on Linux only")
    try:
        return _load(source, *_compiler())
    except subprocess.TimeoutExpired as err:
        raise NotBuilt(f"the compiler took more than {err.timeout:.0f} s") from err
    except subprocess.CalledProcessError as err:
        said = err.stderr.decode(errors="replace").strip().splitlines()
        raise NotBuilt(
            f"the compiler failed: {said[-1] if said else f'exit status {err.returncode}'}"
        ) from err
    except OSError as err:
        raise NotBuilt(str(err)) from err


def _compiler() -> tuple[list[str], bytes]:
    """The command of ``$CC`` or ``cc``, and what it says about its version."""
    words = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(words[0]) is None:
        raise NotBuilt(f"there is no C compiler {words[0]}")
    version = _run([*words, "--version"], _ASK_S)
    if b"clang" in version:
        # Its OpenMP has threads of its own, which wait actively beside torch's.
        raise NotBuilt(f"{words[0]} is clang, and only gcc shares its threads with torch")
    return words, version


def _load(source: Path, compiler: list[str], version: bytes) -> ctypes.CDLL:
    processor = _processor()
    command = [*compiler, *_FLAGS, *(["-march=native"] if processor else [])]
    identity = b"\n".join((source.read_bytes(), version, shlex.join(command).encode(), processor))
    folder = _cache_folder()
    kept = folder and folder / f"{source.stem}-{hashlib.sha256(identity).hexdigest()[:16]}.so"
    if kept and _is_private(kept):
        with contextlib.suppress(OSError):  # damaged: built again
            return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory(prefix="wispprof-") as building:
        built = Path(building) / f"{source.stem}.so"
        _run([*command, "-o", str(built), str(source), "-lm"], _COMPILE_S)
        if kept:
            with contextlib.suppress(OSError):
                write_atomic(kept, built.read_bytes())
                kept.chmod(0o600)
                return ctypes.CDLL(str(kept))
        return ctypes.CDLL(str(built))


def _run(command: list[str], timeout_s: float) -> bytes:
    return subprocess.run(command, capture_output=True, check=True, timeout=timeout_s).stdout


def _cache_folder() -> Path | None:
    """The folder of this user's libraries; ``None`` if there is none, or others may write to it."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wispprof"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home
        return None
    return folder if _is_private(folder) else None


def _is_private(path: Path) -> bool:
    """Whether this user owns the file or folder and nobody else may write to it."""
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _processor() -> bytes:
    """What ``-march=native`` depends on; empty if the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return b""
    names = (b"model name", b"flags", b"Features")
    known = sorted({line for line in lines if line.startswith(names)})
    return b"\n".join((platform.machine().encode(), *known)) if known else b""

"""How a process computes with vLLM on a CPU: its OpenMP library and its threads, fixed when it starts.

``vllm serve`` starts its worker processes with such settings; here the engine runs within the process that
was started.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from wispprof.engines.vllm.versions import DISTRIBUTIONS

ALLOCATOR = "libtcmalloc"
"""An allocator that vLLM advises to preload; its packages do not bring it."""

_SPIN_MS = 5
"""How long an OpenMP thread waits actively for its next work, as in vLLM. Intel's default of 200 ms takes
the core that is left to everything else."""


def on_cpu_build() -> bool:
    """Whether vLLM's CPU build is installed."""
    from importlib.metadata import PackageNotFoundError, version

    for name in DISTRIBUTIONS:
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        return name.endswith("-cpu") or "+cpu" in installed
    return False


def openmp_library(prefix: Path = Path(sys.prefix)) -> Path | None:
    """Intel's OpenMP, which comes with vLLM's CPU build."""
    library = prefix / "lib" / "libiomp5.so"
    return library if library.exists() else None


def missing_settings(
    environ: Mapping[str, str], cores: int, ranks: int = 1, library: Path | None = None
) -> dict[str, str]:
    """Environment variables with which such a process is faster and that ``environ`` does not set.
    ``library``: an OpenMP to preload.

    As vLLM's worker processes: Intel's OpenMP, and one core per rank left to connections and scheduling.
    """
    found = {
        "OMP_NUM_THREADS": str(max(1, (cores - ranks) // ranks)),
        "KMP_BLOCKTIME": str(_SPIN_MS),
    }
    found = {name: value for name, value in found.items() if name not in environ}
    preloaded = environ.get("LD_PRELOAD", "")
    if library is not None and "omp" not in preloaded:
        found["LD_PRELOAD"] = f"{library}:{preloaded}".rstrip(":")
    return found


def restart_for_cpu(ranks: int = 1) -> None:
    """Start this program again with :func:`missing_settings`, if vLLM computes on a CPU and some are missing.
    Does not return then."""
    from wispprof.hardware.machine_info import usable_cores

    if not on_cpu_build() or not sys.platform.startswith("linux"):
        return
    missing = missing_settings(os.environ, usable_cores(), ranks, openmp_library())
    if missing:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | missing)

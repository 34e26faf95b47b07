"""How vLLM's worker processes compute on a CPU: their OpenMP library, threads and cores.

As with ``vllm serve``, the forward pass runs in a process per rank, bound to the cores of a NUMA node but
one, which is left to scheduling and connections. vLLM reads these settings from this process's environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from wispprof.engines.vllm.versions import DISTRIBUTIONS

_SPIN_MS = 5
"""How long an OpenMP thread waits actively for its next work, as in vLLM. Intel's default of 200 ms takes
the core that is left to everything else."""

_NUMA_NODES = Path("/sys/devices/system/node")


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


def numa_nodes(folder: Path = _NUMA_NODES) -> int:
    """NUMA nodes of this machine."""
    return max(1, len(list(folder.glob("node[0-9]*"))))


def missing_settings(
    environ: Mapping[str, str], cores: int, ranks: int = 1, nodes: int = 1, library: Path | None = None
) -> dict[str, str]:
    """Environment variables for ``ranks`` workers that ``environ`` does not set. ``library``: an OpenMP to
    preload.

    vLLM binds each worker to a NUMA node of its own. If there are more ranks than nodes, they share the cores
    unbound, and one core per rank is left to everything else.
    """
    found = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    if ranks > nodes:
        found |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(max(1, (cores - ranks) // ranks)),
            "KMP_BLOCKTIME": str(_SPIN_MS),
        }
    found = {name: value for name, value in found.items() if name not in environ}
    preloaded = environ.get("LD_PRELOAD", "")
    if library is not None and "omp" not in preloaded:
        found["LD_PRELOAD"] = f"{library}:{preloaded}".rstrip(":")
    return found


def prepare_workers(ranks: int) -> None:
    """Set :func:`missing_settings`, if vLLM computes on a CPU."""
    from wispprof.hardware.machine_info import usable_cores

    if on_cpu_build() and sys.platform.startswith("linux"):
        os.environ |= missing_settings(os.environ, usable_cores(), ranks, numa_nodes(), openmp_library())

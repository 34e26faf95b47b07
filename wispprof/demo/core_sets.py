"""Which cores the demo's engines compute on, and which its edges and the servers' other work share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from wispprof.hardware.machine_info import usable_cores


@contextmanager
def two_sets_of_cores() -> Iterator[tuple[list[int], list[int]]]:
    """Cores of the engines, and one for the replayed edges and the servers' other work.

    Both are empty if there is one core, or if the system does not pin. Engines compute with one thread less
    than there are cores.
    """
    import torch

    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    before, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    threads = max(1, min(before, usable_cores() - 1))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the engines' processes
    try:
        yield (cores[:-1], cores[-1:]) if len(cores) > 1 else ([], [])
    finally:
        torch.set_num_threads(before)
        if variable is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = variable


@contextmanager
def running_on(cores: list[int]) -> Iterator[None]:
    """This thread, and the processes it starts meanwhile, on these cores; empty: as before."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)

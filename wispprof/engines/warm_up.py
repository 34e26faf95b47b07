"""Steps before the first served one, which pay for what libraries do at their first use."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from wispprof.backends import Engine
from wispprof.errors import OutOfKvMemory
from wispprof.types import Sampling, StepInput

SESSIONS = 8
"""Most sessions of a step of the warm-up."""

FEW_ROWS = (24, 3, 15, 3)
"""Numbers of rows that are enough if steps of one number cost the next of another nothing."""

_LONGEST_S = 6.0


def warm_up(engine: Engine, rows: Iterable[int], longest: int, most: int = SESSIONS) -> None:
    """Run sampled steps of these numbers of rows, for a few seconds at most. ``longest``: tokens of an input;
    ``most``: inputs of a step.

    On a CPU, oneDNN compiles kernels for each number of rows at the first step that has it, which takes 2 to
    4 ms longer. Beside steps of a large model that is nothing, and few of them fit into the time.
    """
    free = engine.capabilities.max_sessions - len(engine.sessions)
    names = [f"\0warm-up {i}" for i in range(min(SESSIONS, most, free))]
    end_s = time.monotonic() + _LONGEST_S
    try:
        for name in names:
            engine.open(name, Sampling(temperature=1.0))
        for total in rows:
            if total <= longest * len(names) and time.monotonic() < end_s:
                _step(engine, names, total)
    except OutOfKvMemory:
        pass  # Larger steps will not fit later either.
    finally:
        for name in names:
            if name in engine.sessions:
                engine.close(name)


def _step(engine: Engine, names: Sequence[str], rows: int) -> None:
    """So many rows, spread over as many of the sessions as possible."""
    used = names[:rows]
    sizes = [rows // len(used) + (i < rows % len(used)) for i in range(len(used))]
    engine.step(
        [StepInput(name, [0] * size, drafts=size - 1) for name, size in zip(used, sizes, strict=True)]
    )
    for name in used:
        engine.rollback(name, 0)

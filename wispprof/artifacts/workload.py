"""Seen traffic as a workload file: counts alone, so nothing in it names a user, a device or a text.

Lengths are counted in bins that grow by :data:`BIN_RATIO`. Bins with fewer than :data:`LEAST_COUNT` requests
are joined with the nearest, so that no single request can be told from its length.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from wispprof.artifacts import files
from wispprof.artifacts.document import read_document, write_document

WORKLOAD_KIND = "workload"
BIN_RATIO = math.sqrt(2.0)
LEAST_COUNT = 3
HOURS = 24


@dataclass(frozen=True, slots=True)
class LengthBin:
    """``count`` requests whose prompt and output tokens lie in these ranges, both ends included."""

    prompt_from: int
    prompt_to: int
    output_from: int
    output_to: int
    count: int


@dataclass(frozen=True)
class SeenTraffic:
    """What traffic looked like. Rates are requests a second.

    ``by_hour``: mean rate in each hour of the day (UTC), ``None`` where nothing was recorded.
    ``busiest_per_s``: of the busiest hour, or of the whole recording if it is shorter. ``burst``: 99th
    percentile of the rate in windows of 10 s, over the mean. ``reused``: share of prompt tokens whose blocks
    came before. ``slos``: requests by SLO class (tokens/s). ``rtts_ms``: 10th, 50th and 90th percentile of
    round trips. ``cum_acceptance``: share of drafts accepted with all before them, by depth. Empty or 0: the
    source does not say.
    """

    source: str
    requests: int
    hours: float
    mean_per_s: float
    busiest_per_s: float
    burst: float
    by_hour: tuple[float | None, ...]
    lengths: tuple[LengthBin, ...]
    reused: float = 0.0
    slos: dict[str, int] = field(default_factory=dict)
    rtts_ms: tuple[float, ...] = ()
    cum_acceptance: tuple[float, ...] = ()

    def quantile(self, what: str, share: float) -> int:
        """Quantile of ``prompt``, ``output`` or ``context`` (prompt and half the output) in tokens."""
        pairs = sorted((_middle(b, what), b.count) for b in self.lengths)
        left = share * sum(count for _, count in pairs)
        for value, count in pairs:
            left -= count
            if left <= 0:
                return round(value)
        return round(pairs[-1][0])

    def mean(self, what: str) -> float:
        """Mean of the same."""
        total = sum(b.count for b in self.lengths)
        return sum(_middle(b, what) * b.count for b in self.lengths) / total

    def contexts(self) -> tuple[int, ...]:
        """Contexts to plan for: the 10th, 50th, 90th and 99th percentile, without near equals."""
        found: list[int] = []
        for share in (0.1, 0.5, 0.9, 0.99):
            value = max(1, self.quantile("context", share))
            if not found or value >= 1.5 * found[-1]:
                found.append(value)
        return tuple(found)


def _middle(b: LengthBin, what: str) -> float:
    prompt, output = math.sqrt(b.prompt_from * b.prompt_to), math.sqrt(b.output_from * b.output_to)
    return {"prompt": prompt, "output": output, "context": prompt + output / 2}[what]


def save_workload(workload: SeenTraffic, path: Path) -> str:
    """Write a workload atomically; returns its content hash."""
    return write_document(Path(path), WORKLOAD_KIND, asdict(workload))


def load_workload(path: Path) -> SeenTraffic:
    """Read a workload; raises the artifact errors."""
    document = read_document(Path(path), WORKLOAD_KIND)
    found: SeenTraffic = files.convert(
        document.payload, SeenTraffic, f"workload {path}", "Make it anew with `wispprof traffic`."
    )
    return found

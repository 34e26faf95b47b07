"""Confidence in a median, without assuming how noise is distributed; and many decisions at once.

What a sweep has gathered so far: visits to shots, which of them were disturbed, and the rows they make.

A sweep comes to a shot several times, a few samples each time, so that a slow minute of the machine
falls upon all shots alike. Between the visits stand looks at the sentinel: one shape, always the same. A
look whose median is off says that the machine was disturbed there, and the visits beside it are set
aside where a shot has enough others.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from wispprof.artifacts.rows import EdgeRow, LinkRow, Row

__all__ = [
    "MeasurementLog",
    "discoveries",
    "drift_summary",
    "half_width",
    "median_interval",
    "relative_spread",
    "samples_needed",
]

_EXACT = 1000
"""Beyond, the binomial is taken for normal: 2.0**n overflows, and a rank more or less shows nowhere."""
FEWEST = 6
"""Samples below which no order statistics bracket the median with 95 % confidence."""
_NORMAL = statistics.NormalDist()


@functools.cache
def _rank(n: int, confidence: float) -> int:
    """The largest r with P(the r-th smallest and r-th largest of n bracket the median) >= confidence;
    0 where there is none. The count of samples below the median is binomial(n, 1/2)."""
    if n > _EXACT:
        z = _NORMAL.inv_cdf((1 + confidence) / 2)
        return math.floor((n - z * math.sqrt(n)) / 2)
    tail, rank = 0.0, 0
    while True:
        tail += math.comb(n, rank) / 2.0**n
        if 2 * tail > 1 - confidence:
            return rank
        rank += 1


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Order-statistic confidence interval of the median; infinite with fewer than six samples."""
    rank = _rank(len(samples), confidence) if samples else 0
    if rank == 0:
        return -math.inf, math.inf
    ordered = sorted(samples)
    return ordered[rank - 1], ordered[-rank]


def half_width(samples: Sequence[float], confidence: float = 0.95) -> float:
    """Half the interval's width relative to the median; infinite while it is unknown."""
    low, high = median_interval(samples, confidence)
    middle = statistics.median(samples) if samples else 0.0
    return (high - low) / 2 / middle if middle > 0 else math.inf


def relative_spread(samples: Sequence[float]) -> float:
    """Standard deviation over median as the range of the samples tells it; 0 of fewer than two.

    The range, because it is what :func:`half_width` of few samples rests on.
    """
    middle = statistics.median(samples) if len(samples) > 1 else 0.0
    if middle <= 0:
        return 0.0
    return (max(samples) - min(samples)) / middle / (2 * _score(1, len(samples)))


@functools.lru_cache(maxsize=4096)
def samples_needed(spread: float, target: float, least: int, most: int) -> int:
    """Samples of normal noise (``spread``: standard deviation over median) until :func:`half_width`
    is expected under ``target``; between ``least`` and ``most``."""
    for n in range(max(FEWEST, least), most):
        if spread * _score(_rank(n, 0.95), n) <= target:
            return n
    return most


@functools.cache
def _score(rank: int, n: int) -> float:
    """How far the rank-th largest of n normal samples is expected from the median (Blom)."""
    return _NORMAL.inv_cdf(1 - (rank - 0.375) / (n + 0.25))


def discoveries(p_values: Sequence[float], rate: float = 0.05) -> list[bool]:
    """Which hypotheses to reject so that at most ``rate`` of the rejected are expected to be true
    (Benjamini and Hochberg 1995)."""
    count = len(p_values)
    order = sorted(range(count), key=lambda i: p_values[i])
    last = max((r for r, i in enumerate(order, 1) if p_values[i] <= rate * r / count), default=0)
    chosen = set(order[:last])
    return [i in chosen for i in range(count)]


_FEW = 3
"""Undisturbed samples with which a median is better than with the disturbed ones added."""


class MeasurementLog:
    """Visits by key, in the order they were made. ``drift``: how far a look may be from the others."""

    def __init__(self, drift: float, rows: Iterable[Row] = ()) -> None:
        self._drift = drift
        self._visits: dict[str, list[Row]] = {}
        self._looks: dict[int, Row] = {}
        self._marks: list[int] = []
        self._off: list[bool] = []
        self.next_order = 0
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """Take a visit, or a look at the sentinel, in; its order must be the highest so far."""
        if row.order < self.next_order:
            raise ValueError(f"visit {row.order} comes after visit {self.next_order - 1}")
        self.next_order = row.order + 1
        if row.kind == "sentinel":
            self._looks[row.order] = row
            self._judge()
        else:
            self._visits.setdefault(row.key, []).append(row)

    def count(self, key: str) -> int:
        """Visits to a shot so far."""
        return len(self._visits.get(key, ()))

    def samples(self, key: str) -> tuple[float, ...]:
        """Every sample of a shot, disturbed ones too."""
        return _joined(self._visits.get(key, ()))

    def clean(self, key: str) -> tuple[float, ...]:
        """Samples of a shot that were taken while the sentinel stood where it stands mostly."""
        return _joined([v for v in self._visits.get(key, ()) if not self.disturbed(v.order)])

    def disturbed(self, order: int) -> bool:
        """Whether the look before or after this place was off."""
        after = bisect.bisect_left(self._marks, order)
        return any(self._off[max(0, after - 1) : after + 1])

    def rows(self, least: int, target: float) -> tuple[Row, ...]:
        """One row a shot and one a look, by the order in which they were first measured.

        ``drift`` marks a row that rests on disturbed samples, or on fewer than ``least`` others;
        ``noisy`` one whose interval is wider than ``target``.
        """
        reference_samples = [
            _flagged(row, ("drift",) if off else (), target)
            for row, off in zip(self._looks.values(), self._off, strict=True)
        ]
        made = [self._row(blocks, least, target) for blocks in self._visits.values()]
        return tuple(sorted((*reference_samples, *made), key=lambda row: row.order))

    def _row(self, blocks: list[Row], least: int, target: float) -> Row:
        first = blocks[0]
        if isinstance(first, LinkRow):
            return first
        good = [block for block in blocks if not self.disturbed(block.order)]
        kept = good if len(_joined(good)) >= _FEW else blocks
        aside = [block for block in blocks if block not in kept]
        thin = len(good) < len(blocks) and len(_joined(good)) < least
        flags = sorted({flag for block in kept for flag in block.flags})
        row = replace(
            first,
            samples_ms=_joined(kept),
            flags=tuple(flags),
            blocks=_places(kept) if len(blocks) > 1 else (),
            set_aside_ms=_joined(aside),
            set_aside_blocks=_places(aside),
        )
        if isinstance(row, EdgeRow) and row.kind in ("burst", "sustained", "energy"):
            return row  # a window's spread is a finding, not a fault
        return _flagged(row, ("drift",) if thin else (), target)

    def _judge(self) -> None:
        """What the machine does undisturbed is the reference: the lower quartile of the looks' medians,
        since disturbance only adds time."""
        self._marks = list(self._looks)
        medians = [row.median_ms for row in self._looks.values()]
        if len(medians) < 2:
            self._off = [False] * len(medians)
            return
        reference = statistics.quantiles(medians, n=4, method="inclusive")[0]
        self._off = [abs(ms / reference - 1) > self._drift for ms in medians]


def _places(blocks: Sequence[Row]) -> tuple[tuple[int, int], ...]:
    return tuple((block.order, len(block.samples_ms)) for block in blocks)


def _joined(blocks: Sequence[Row]) -> tuple[float, ...]:
    return tuple(itertools.chain.from_iterable(block.samples_ms for block in blocks))


def _flagged(row: Row, more: tuple[str, ...], target: float) -> Row:
    noisy = ("noisy",) if half_width(row.samples_ms) > target else ()
    return replace(row, flags=(*noisy, *row.flags, *more))


def drift_summary(rows: Iterable[Row], tolerance: float) -> Mapping[str, float | int | bool]:
    """What the sentinels say, for the manifest: looks, their spread, what was marked and set aside."""
    listed = list(rows)
    reference_samples = [row for row in listed if row.kind == "sentinel"]
    medians = [row.median_ms for row in reference_samples]
    workloads = [row for row in listed if row.kind != "sentinel"]
    worst = max(medians) / min(medians) - 1 if medians and min(medians) > 0 else 0.0
    marked = sum("drift" in row.flags for row in workloads)
    off = sum("drift" in row.flags for row in reference_samples)
    return {
        "sentinels": len(reference_samples),
        "off": off,
        "tolerance": tolerance,
        "spread": round(worst, 4),
        "drifted_rows": marked,
        "set_aside": sum(
            len(row.set_aside_ms) for row in workloads if not isinstance(row, LinkRow)
        ),
        "drifted": off > 0,
    }

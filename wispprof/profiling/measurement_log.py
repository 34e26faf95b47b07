"""The blocks that a sweep has measured, which of them were disturbed, and the rows they become.

The sentinel, one fixed workload, is measured between the blocks. If its median is off, the machine was
disturbed: the neighbouring blocks are set aside if the workload has enough others. Medians get confidence
intervals from order statistics, which assume nothing about the distribution of the noise.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from wispprof.artifacts.median_interval import half_width, interval_rank
from wispprof.artifacts.median_interval import median_interval as median_interval
from wispprof.artifacts.rows import EdgeRow, LinkRow, Row

_MIN_INTERVAL_SAMPLES = 6
"""With fewer samples no order statistics bracket the median with 95 % confidence."""
_MIN_CLEAN_SAMPLES = 3
"""Undisturbed samples from which a median is better without the disturbed ones."""
_NORMAL = statistics.NormalDist()


def relative_spread(samples: Sequence[float]) -> float:
    """Standard deviation over median, estimated from the range; 0 with fewer than two samples.

    The range, because :func:`half_width` of few samples depends on it too.
    """
    median = statistics.median(samples) if len(samples) > 1 else 0.0
    if median <= 0:
        return 0.0
    return (max(samples) - min(samples)) / median / (2 * _expected_score(1, len(samples)))


@functools.lru_cache(maxsize=4096)
def samples_needed(spread: float, target: float, min_samples: int, max_samples: int) -> int:
    """Samples of normal noise (``spread``: standard deviation over median) until :func:`half_width` is
    expected below ``target``; between ``min_samples`` and ``max_samples``."""
    for n in range(max(_MIN_INTERVAL_SAMPLES, min_samples), max_samples):
        if spread * _expected_score(interval_rank(n, 0.95), n) <= target:
            return n
    return max_samples


@functools.cache
def _expected_score(rank: int, n: int) -> float:
    """Expected distance of the rank-th largest of n normal samples from the median (Blom 1958)."""
    return _NORMAL.inv_cdf(1 - (rank - 0.375) / (n + 0.25))


class MeasurementLog:
    """Blocks by workload key, in the order of measurement.

    ``drift``: largest relative difference of a reference measurement from the undisturbed ones.
    """

    def __init__(self, drift: float, rows: Iterable[Row] = ()) -> None:
        self._drift = drift
        self._blocks: dict[str, list[Row]] = {}
        self._references: list[Row] = []
        self._reference_orders: list[int] = []
        self._is_off: list[bool] = []
        self.next_order = 0
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """Add a block, or a reference measurement of the sentinel. Its order must be the highest so far."""
        if row.order < self.next_order:
            raise ValueError(f"block {row.order} comes after block {self.next_order - 1}")
        self.next_order = row.order + 1
        if row.kind == "sentinel":
            self._references.append(row)
            self._reference_orders.append(row.order)
            self._judge_references()
        else:
            self._blocks.setdefault(row.key, []).append(row)

    def block_count(self, key: str) -> int:
        return len(self._blocks.get(key, ()))

    def samples(self, key: str) -> tuple[float, ...]:
        """All samples of a workload, disturbed ones too."""
        return _joined(self._blocks.get(key, ()))

    def clean_samples(self, key: str) -> tuple[float, ...]:
        """Samples of a workload from undisturbed blocks."""
        return _joined([b for b in self._blocks.get(key, ()) if not self.is_disturbed(b.order)])

    def is_disturbed(self, order: int) -> bool:
        """Whether the reference measurement before or after this place was off."""
        after = bisect.bisect_left(self._reference_orders, order)
        return any(self._is_off[max(0, after - 1) : after + 1])

    def rows(self, min_samples: int, target: float) -> tuple[Row, ...]:
        """One row per workload and one per reference measurement, by the order of their first block.

        ``drift`` flags a row with disturbed samples, or with fewer than ``min_samples`` others;
        ``noisy`` a row whose interval is wider than ``target``.
        """
        references = [
            _flagged(row, ("drift",) if off else (), target)
            for row, off in zip(self._references, self._is_off, strict=True)
        ]
        merged = [self._merged(blocks, min_samples, target) for blocks in self._blocks.values()]
        return tuple(sorted((*references, *merged), key=lambda row: row.order))

    def _merged(self, blocks: list[Row], min_samples: int, target: float) -> Row:
        first = blocks[0]
        if isinstance(first, LinkRow):
            return first
        clean = [block for block in blocks if not self.is_disturbed(block.order)]
        kept = clean if len(_joined(clean)) >= _MIN_CLEAN_SAMPLES else blocks
        set_aside = [block for block in blocks if block not in kept]
        drifted = len(clean) < len(blocks) and len(_joined(clean)) < min_samples
        row = replace(
            first,
            samples_ms=_joined(kept),
            flags=tuple(sorted({flag for block in kept for flag in block.flags})),
            blocks=_orders(kept) if len(blocks) > 1 else (),
            set_aside_ms=_joined(set_aside),
            set_aside_blocks=_orders(set_aside),
        )
        if isinstance(row, EdgeRow) and row.kind in ("burst", "sustained", "energy"):
            return row  # the spread within a window is a result, not a fault
        return _flagged(row, ("drift",) if drifted else (), target)

    def _judge_references(self) -> None:
        """Compare with the lower quartile of the medians: disturbance only adds time."""
        medians = [row.median_ms for row in self._references]
        if len(medians) < 2:
            self._is_off = [False] * len(medians)
            return
        undisturbed = statistics.quantiles(medians, n=4, method="inclusive")[0]
        self._is_off = [abs(ms / undisturbed - 1) > self._drift for ms in medians]


def _orders(blocks: Sequence[Row]) -> tuple[tuple[int, int], ...]:
    return tuple((block.order, len(block.samples_ms)) for block in blocks)


def _joined(blocks: Sequence[Row]) -> tuple[float, ...]:
    return tuple(itertools.chain.from_iterable(block.samples_ms for block in blocks))


def _flagged(row: Row, more: tuple[str, ...], target: float) -> Row:
    noisy = ("noisy",) if half_width(row.samples_ms) > target else ()
    return replace(row, flags=(*noisy, *row.flags, *more))


def drift_summary(rows: Sequence[Row], tolerance: float) -> Mapping[str, float | int | bool]:
    """Drift of the sentinel for the manifest: its spread, and how much was flagged and set aside."""
    references = [row for row in rows if row.kind == "sentinel"]
    others = [row for row in rows if row.kind != "sentinel"]
    medians = [row.median_ms for row in references]
    spread = max(medians) / min(medians) - 1 if medians and min(medians) > 0 else 0.0
    off = sum("drift" in row.flags for row in references)
    return {
        "sentinels": len(references),
        "off": off,
        "tolerance": tolerance,
        "spread": round(spread, 4),
        "drifted_rows": sum("drift" in row.flags for row in others),
        "set_aside": sum(len(row.set_aside_ms) for row in others if not isinstance(row, LinkRow)),
        "drifted": off > 0,
    }

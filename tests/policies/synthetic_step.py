"""A step estimator in closed form for the tests: fixed + rows + pairs + cache reads, in ms."""

from __future__ import annotations

from dataclasses import dataclass, replace

from wispprof.types import BatchCost, StepTimeEstimator


@dataclass(frozen=True, slots=True)
class SyntheticBatch(BatchCost):
    estimator: SyntheticEstimator
    rows: int = 0
    cached: int = 0
    pairs: int = 0

    @property
    def p50_ms(self) -> float:
        return self.estimator.time(self.rows, self.cached, self.pairs)

    @property
    def bound_ms(self) -> float:
        return self.p50_ms * self.estimator.ratio

    def add(self, new: int, cached: int, prefill: bool = False) -> SyntheticBatch:
        return replace(
            self,
            rows=self.rows + new,
            cached=self.cached + cached,
            pairs=self.pairs + new * cached + new * (new + 1) // 2,
        )


@dataclass(frozen=True, slots=True)
class SyntheticEstimator(StepTimeEstimator):
    """``flat_rows``: rows below this cost as much as this many (weights bind); ``bucket``: rows are
    padded to its multiples (graph buckets)."""

    fixed: float = 18.0
    row: float = 0.12
    kv: float = 0.06e-3
    pair: float = 0.0
    flat_rows: int = 0
    bucket: int = 1
    ratio: float = 1.1
    coverage: float = 0.95

    def time(self, rows: int, cached: int, pairs: int) -> float:
        if not rows:
            return 0.0
        rows = max(-(-rows // self.bucket) * self.bucket, self.flat_rows)
        return self.fixed + self.row * rows + self.kv * cached + self.pair * pairs

    def start(self) -> SyntheticBatch:
        return SyntheticBatch(self)

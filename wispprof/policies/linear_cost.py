"""The linear step-time model with given coefficients: how publications describe a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wispprof.types import BatchCost, BatchShape, BatchTotals, StepTimeEstimator

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LinearCost(StepTimeEstimator):
    """``fixed + Σ (item + row·new + pair·pairs + kv·cached)``; ``pairs`` = new·cached + new(new+1)/2.

    ``floor_rows``: rows that cost nothing because the step is bound by reading the weights: the row and
    the fixed term then read ``max(fixed, row·Σ new)``-like, as ``fixed + row·max(0, Σ new - floor_rows)``.
    ``bound_ratio``: upper bound over median, of coverage ``covers``.
    """

    fixed_ms: float
    row_ms: float = 0.0
    kv_ms: float = 0.0
    pair_ms: float = 0.0
    item_ms: float = 0.0
    floor_rows: int = 0
    bound_ratio: float = 1.1
    covers: float = 0.95

    def __post_init__(self) -> None:
        weights = (self.fixed_ms, self.row_ms, self.kv_ms, self.pair_ms, self.item_ms)
        if min(weights) < 0 or self.bound_ratio < 1:
            raise ValueError(f"costs must not be negative and bound_ratio at least 1, got {self}")

    @property
    def coverage(self) -> float:
        return self.covers

    def start(self) -> BatchCost:
        return _LinearBatch(self, 0.0, 0, 0.0)

    def p50_ms(self, rows: int, work: float) -> float:
        """Of a step with so many rows whose items and pairs take ``work`` ms."""
        charged = rows - self.floor_rows
        return self.fixed_ms + work + (self.row_ms * charged if charged > 0 else 0.0)

    def predict(self, shape: BatchShape) -> tuple[float, float]:
        items = shape.items
        batch = self.start().add_all([i.new for i in items], [i.cached for i in items])
        return batch.p50_ms, batch.bound_ms

    def predict_totals(self, totals: BatchTotals[Any]) -> tuple[FloatArray, FloatArray]:
        p50 = self.fixed_ms + self.item_ms * totals.items + self.kv_ms * totals.sum_cached
        p50 += self.pair_ms * totals.attention_pairs
        p50 += self.row_ms * np.maximum(totals.sum_new - self.floor_rows, 0.0)
        p50 *= totals.items > 0
        return p50, p50 * self.bound_ratio


class _LinearBatch(BatchCost):
    __slots__ = ("_cost", "_p50_ms", "_rows", "_work")

    def __init__(self, cost: LinearCost, work: float, rows: int, p50_ms: float) -> None:
        self._cost = cost
        self._work = work
        self._rows = rows
        self._p50_ms = p50_ms

    @property
    def p50_ms(self) -> float:
        return self._p50_ms

    @property
    def bound_ms(self) -> float:
        return self._p50_ms * self._cost.bound_ratio

    def add(self, new: int, cached: int, prefill: bool = False) -> BatchCost:
        cost, rows = self._cost, self._rows + new
        work = self._work + cost.item_ms + cost.kv_ms * cached
        if cost.pair_ms:
            work += cost.pair_ms * (new * cached + new * (new + 1) / 2)
        return _LinearBatch(cost, work, rows, cost.p50_ms(rows, work))

    def add_all(self, new: Sequence[int], cached: Sequence[int]) -> BatchCost:
        cost, work = self._cost, self._work
        for rows, held in zip(new, cached, strict=True):
            work = work + cost.item_ms + cost.kv_ms * held
            if cost.pair_ms:
                work += cost.pair_ms * (rows * held + rows * (rows + 1) / 2)
        total = self._rows + sum(new)
        return _LinearBatch(cost, work, total, cost.p50_ms(total, work) if total else 0.0)

    def add_many(
        self, new: NDArray[np.int64], cached: NDArray[np.int64], prefill: object = False
    ) -> tuple[FloatArray, FloatArray]:
        cost = self._cost
        p50 = cost.fixed_ms + self._work + cost.item_ms + cost.kv_ms * cached.astype(np.float64)
        p50 = p50 + cost.pair_ms * (new * cached + new * (new + 1) / 2)
        p50 = p50 + cost.row_ms * np.maximum(self._rows + new - cost.floor_rows, 0)
        return p50, p50 * cost.bound_ratio

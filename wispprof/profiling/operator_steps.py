"""Step times of ragged batches, put together from measured operators.

- Operators of each token are priced at all rows of the step, the output head at the rows that are sampled:
  every row of a verify item, one of a prompt chunk. Both curves keep the measured row counts as knots, so
  tile edges stay where they were measured. Where tables fall, the nearest curve that never falls is taken.
- Attention of a verify item is the larger of the kernel for several tokens and the decode kernel: a verify
  step reads at least the cache that a decode step reads. Prompt chunks are a launch of their own.
- The tables know uniform batches only. A ragged launch of n items costs at least its heaviest part alone: the
  largest, over m, of the mean cost of the m heaviest items, each as in a uniform batch of m like it. For a
  uniform batch this is the table's own value, split into groups or not. It never falls if work is added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wispprof.fitting.batch_totals import FloatArray
from wispprof.profiling.operator_tables import STEP_TOKENS, OperatorTables, Shares
from wispprof.types import BatchShape, VerifyItem

ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
NEW = (1, 2, 3, 5, 9, 17, 33)
CHUNK_ITEMS = (1, 2, 4, 8, 16, 32, 64)
CHUNKS = (1, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12_288, 16_384)
CACHED = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)


def never_falling(values: FloatArray) -> FloatArray:
    """The nearest sequence (least squares of logarithms) that never falls: pool adjacent violators."""
    pools: list[tuple[float, int]] = []
    for value in np.log(values):
        mean, count = float(value), 1
        while pools and pools[-1][0] > mean:
            before, others = pools.pop()
            mean = (before * others + mean * count) / (others + count)
            count += others
        pools.append((mean, count))
    result: FloatArray = np.exp(np.repeat([m for m, _ in pools], [n for _, n in pools]))
    return result


@dataclass(frozen=True)
class RowCurve:
    """Milliseconds by rows, linear between knots, never falling; ``fall``: how far the tables' own values
    lie from it at most."""

    knots: FloatArray
    values: FloatArray
    fall: float

    @classmethod
    def of(cls, knots: Sequence[int], price: Callable[[int], float]) -> RowCurve:
        raw = np.array([price(rows) for rows in knots])
        values = never_falling(raw)
        return cls(np.array(knots, dtype=np.float64), values, float(np.abs(raw / values - 1.0).max()))

    def __call__(self, rows: float) -> float:
        knots, values = self.knots, self.values
        if rows > knots[-1]:
            return float(values[-1] * rows / knots[-1])
        return float(np.interp(rows, knots, values))


@dataclass(frozen=True)
class AttentionSurface:
    """Milliseconds by items, new and cached tokens, linear between the axes' points, never falling.

    ``axes``: three ascending arrays; ``ms``: one value per point. Beyond an axis the last
    slope goes on; below its first point nothing changes.
    """

    axes: tuple[FloatArray, FloatArray, FloatArray]
    ms: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        items: Sequence[int],
        new: Sequence[int],
        cached: Sequence[int],
        price: Callable[[int, int, int], float],
    ) -> AttentionSurface:
        raw = np.array([[[price(i, n, c) for c in cached] for n in new] for i in items])
        above, below = raw, raw
        for axis in range(3):
            above = np.maximum.accumulate(above, axis=axis)
            below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis=axis), axis)
        axes = (np.array(items, float), np.array(new, float), np.array(cached, float))
        # Neither bound falls, so their geometric mean does not either; it equals them where the table rises.
        return cls(axes, np.sqrt(above * below))

    def at(self, new: float, cached: float) -> FloatArray:
        """Of items × ``new`` over ``cached`` at each point of the items axis."""
        _, by_new, by_cached = self.axes
        plane = _between(self.ms, by_new, new, axis=1)
        return _between(plane, by_cached, cached, axis=1)


def _between(values: FloatArray, axis_points: FloatArray, x: float, axis: int) -> FloatArray:
    """Linear interpolation along one axis, which it removes."""
    x = max(x, float(axis_points[0]))
    place = int(np.clip(np.searchsorted(axis_points, x, side="right") - 1, 0, len(axis_points) - 2))
    low, high = axis_points[place], axis_points[place + 1]
    share = (x - low) / (high - low)
    below, above = values.take(place, axis=axis), values.take(place + 1, axis=axis)
    mixed: FloatArray = below + share * (above - below)
    return mixed


def launch_ms(surface: AttentionSurface, items: Sequence[VerifyItem]) -> float:
    """Attention of one ragged launch; see the module's text."""
    if not items:
        return 0.0
    groups = Counter((i.new, i.cached) for i in items)
    counts = np.arange(1, len(items) + 1, dtype=np.float64)
    points = surface.axes[0]
    # Every item as in a uniform batch of m, for m from 1 on: (groups, items).
    prices = []
    for new, cached in groups:
        known = surface.at(new, cached)
        if counts[-1] > points[-1]:
            last = known[-1] + (known[-1] - known[-2]) / (points[-1] - points[-2]) * (counts - points[-1])
            prices.append(np.where(counts > points[-1], last, np.interp(counts, points, known)))
        else:
            prices.append(np.interp(counts, points, known))
    table, sizes = np.array(prices), np.array(list(groups.values()))
    if len(groups) == 1:
        return float(table[0, -1])
    best = 0.0
    for m in range(1, len(items) + 1):
        column = table[:, m - 1]
        order = np.argsort(-column, kind="stable")
        taken = np.minimum(sizes[order], np.maximum(m - np.cumsum(sizes[order]) + sizes[order], 0))
        best = max(best, float((column[order] * taken).sum() / m))
    return best


class OperatorSteps:
    """Prices steps of any shape on one target. Building it evaluates a few thousand operators."""

    def __init__(self, tables: OperatorTables) -> None:
        self._tables = tables
        self.knots = knots = [rows for rows in tables.measured_rows if rows <= 4 * STEP_TOKENS]
        self.rows = RowCurve.of(knots, lambda r: sum(ms for _, ms, _ in tables.tokenwise(r)))
        self.head = RowCurve.of(knots, lambda r: sum(ms for _, ms, _ in tables.output_head(r)))

        def verify(items: int, new: int, cached: int) -> float:
            decode_ms = tables.decode_attention(items, cached + new)
            return decode_ms if new == 1 else max(decode_ms, tables.prompt_attention(items, new, cached))

        self.verify = AttentionSurface.of(ITEMS, NEW, CACHED[1:], verify)
        self.chunks = AttentionSurface.of(CHUNK_ITEMS, CHUNKS, CACHED, tables.prompt_attention)

    def step_ms(self, shape: BatchShape) -> float:
        """Milliseconds of a step."""
        tokenwise_ms, head_ms, verify_ms, chunk_ms = self.parts(shape)
        return tokenwise_ms + head_ms + verify_ms + chunk_ms

    def parts(self, shape: BatchShape) -> tuple[float, float, float, float]:
        """Milliseconds of operators of each token, output head, attention of verify items and of chunks."""
        verifying = [i for i in shape.items if not i.prefill]
        prompts = [i for i in shape.items if i.prefill]
        sampled = sum(i.new for i in verifying) + len(prompts)
        return (
            self.rows(shape.new_tokens),
            self.head(sampled),
            launch_ms(self.verify, verifying),
            launch_ms(self.chunks, prompts),
        )

    def shares(self, shape: BatchShape) -> Shares:
        """Of the step's time by the origin of its operators."""
        _, _, verify_ms, chunk_ms = self.parts(shape)
        verifying = [i for i in shape.items if not i.prefill]
        sampled = sum(i.new for i in verifying) + len(shape.items) - len(verifying)
        operators = self._tables.tokenwise(shape.new_tokens) + self._tables.output_head(sampled)
        by_origin: dict[str, float] = dict.fromkeys(Shares._fields, 0.0)
        for _, ms, origin in operators:
            by_origin[origin] += ms
        # The decode kernel alone is interpolated; over a cached prefix the other one is scaled by a formula.
        plain = all(i.new == 1 for i in verifying)
        by_origin["interpolated" if plain else "formula"] += verify_ms
        by_origin["formula"] += chunk_ms
        total = sum(by_origin.values())
        return Shares(*(by_origin[name] / total for name in Shares._fields))

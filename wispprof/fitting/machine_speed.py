"""Machine speed during a sweep, learned from the sentinel, the reference workload repeated throughout it.

If the sentinel's times vary much more than its samples scatter, the machine's speed changed, and the
blocks measured nearby changed with it. On a shared VM blocks of one shape vary by a sixth within half a
second. Reference samples beside each block remove two thirds of that from the medians.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from wispprof.artifacts.rows import StepRow
from wispprof.fitting.batch_totals import FloatArray

MINIMUM_REFERENCES = 4
MINIMUM_REPEATS = 30
"""Blocks beyond the first of their rows from which on sensitivity to the sentinel is learned."""
DENSE = 0.5
"""Reference samples per block from which on machine speed is known at every block."""
CLIP = 2.5
"""Robust deviations beyond which a block weighs less in learning the sensitivity."""
MAX_SENSITIVITY = 1.2

Block = tuple[int, tuple[float, ...]]
"""(order, samples in ms)."""


def blocks_of(row: StepRow) -> Iterator[Block]:
    """The blocks of a row, followed by those set aside if the row states their order."""
    for blocks, samples in (
        (row.blocks or ((row.order, len(row.samples_ms)),), row.samples_ms),
        (row.set_aside_blocks, row.set_aside_ms),
    ):
        start = 0
        for order, count in blocks:
            yield order, samples[start : start + count]
            start += count


@dataclass(frozen=True)
class MachineSpeed:
    """How slow the machine was, by place in the order of measurement.

    ``orders`` and ``log_slowdown`` (m,): reference samples and how slow they were against their median.
    A step of t ms shows the share ``sensitivity + bend · log(t / at_ms)`` of it: long steps see less of
    a short disturbance. ``learned``: the rows' own blocks gave the sensitivity; otherwise it is the share
    of the sentinel's variance that its samples' scatter does not explain. ``dense``: there are reference
    samples beside the blocks.
    """

    orders: FloatArray
    log_slowdown: FloatArray
    sensitivity: float = 0.0
    bend: float = 0.0
    at_ms: float = 1.0
    learned: bool = False
    dense: bool = False

    @classmethod
    def of(cls, rows: Sequence[StepRow]) -> MachineSpeed | None:
        """Learn from rows; None if they hold too few reference samples, or several sentinels."""
        references = sorted((r for r in rows if r.kind == "sentinel"), key=lambda r: r.order)
        if len(references) < MINIMUM_REFERENCES or len({r.shape.key() for r in references}) != 1:
            return None
        orders = np.array([r.order for r in references], dtype=np.float64)
        if len(np.unique(orders)) < len(orders):
            return None  # of several sweeps: their orders are unrelated
        log_ms = np.log([r.median_ms for r in references])
        sensitivity = _unexplained_share(references, log_ms)
        rows_blocks = [list(blocks_of(r)) for r in rows if r.kind != "sentinel"]
        dense = len(references) >= DENSE * sum(len(blocks) for blocks in rows_blocks)
        speed = cls(orders, log_ms - np.median(log_ms), sensitivity, dense=dense)
        return speed._learn([blocks for blocks in rows_blocks if len(blocks) > 1])

    def _learn(self, rows_blocks: Sequence[Sequence[Block]]) -> MachineSpeed:
        """Regress the differences between blocks of one shape on the sentinel's between them."""
        if sum(len(blocks) - 1 for blocks in rows_blocks) < MINIMUM_REPEATS:
            return self
        own, reference, size = [], [], []
        for blocks in rows_blocks:
            times = np.log([np.median(samples) for _, samples in blocks])
            slowdown = self._at([order for order, _ in blocks])
            own.append(times - times.mean())
            reference.append(slowdown - slowdown.mean())
            size.append(np.full(len(blocks), np.median(times)))
        y, x, t = (np.concatenate(part) for part in (own, reference, size))
        middle = float(np.median(t))
        design = np.stack([x, x * (t - middle)], axis=1)
        weight = np.ones(len(y))
        found = np.zeros(2)
        for _ in range(5):
            root = np.sqrt(weight)[:, None]
            found, *_ = np.linalg.lstsq(design * root, y * root[:, 0], rcond=None)
            error = np.abs(y - design @ found)
            reach = CLIP * 1.4826 * max(float(np.median(error)), 1e-9)
            weight = np.minimum(1.0, reach / np.maximum(error, 1e-12))
        at_ms = float(np.exp(middle))
        sensitivity, bend = found.tolist()
        return MachineSpeed(self.orders, self.log_slowdown, sensitivity, bend, at_ms, True, self.dense)

    def _at(self, orders: Sequence[int]) -> FloatArray:
        return np.asarray(np.interp(orders, self.orders, self.log_slowdown))

    def slowdown(self, orders: Sequence[int], ms: float) -> FloatArray:
        """How slow a step of ``ms`` was at these places, (n,), against the machine's typical speed."""
        share = self.sensitivity
        if self.learned:
            share += self.bend * np.log(ms / self.at_ms)
        slowdown: FloatArray = np.exp(float(np.clip(share, 0.0, MAX_SENSITIVITY)) * self._at(orders))
        return slowdown


def _unexplained_share(references: Sequence[StepRow], log_ms: FloatArray) -> float:
    """Share of the sentinel's variance that its samples' scatter does not explain, so that on a quiet
    machine its own noise does not enter every row."""
    scatter = [
        np.var(np.log(r.samples_ms), ddof=1) / len(r.samples_ms) for r in references if len(r.samples_ms) > 1
    ]
    # The variance of a median is about π / 2 times that of a mean.
    noise = 1.57 * float(np.mean(scatter)) if scatter else 0.0
    spread = float(np.var(log_ms, ddof=1))
    return max(0.0, 1.0 - noise / spread) if spread > 0 else 0.0


def slowdown_of_rows(rows: Sequence[StepRow], speed: MachineSpeed | None = None) -> FloatArray:
    """How slow the machine was at each row, (n,), against its typical speed; ones if unknown.

    A row of several blocks has the geometric mean of theirs, weighted by samples.
    """
    speed = speed or MachineSpeed.of(rows)
    if speed is None:
        return np.ones(len(rows))
    slowdown = np.empty(len(rows))
    for number, row in enumerate(rows):
        blocks = list(blocks_of(row))
        each = np.log(speed.slowdown([order for order, _ in blocks], row.median_ms))
        slowdown[number] = np.exp(np.average(each, weights=[len(s) for _, s in blocks]))
    return slowdown

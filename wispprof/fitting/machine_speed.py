"""What the sentinel says about a busy machine: how slow it was at each visit to a row.

The sentinel is one shape repeated through the sweep. Where its times move far more than its samples
scatter, the machine moved, and every row near it was measured on a machine as much slower or faster.
A virtual machine whose neighbours come and go moves by a sixth from one half second to the next; taken
out of the medians by looks that stand beside every visit, a third of that remains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from wispprof.artifacts.rows import StepRow
from wispprof.fitting.batch_totals import FloatArray

__all__ = ["MachineSpeed", "drift_factors", "visits_of"]

MINIMUM_SENTINELS = 4
MINIMUM_FREEDOM = 30
"""Visits beyond the first of their rows from which how far shapes follow the sentinel can be told."""
CLOSE = 0.5
"""Looks per visit from which the machine's pace is known at every visit."""
CLIP = 2.5
"""Robust deviations beyond which a visit counts no more for how far shapes follow the sentinel."""

_MOST_SHARE = 1.2


def visits_of(row: StepRow) -> Iterator[tuple[int, tuple[float, ...]]]:
    """(order, samples in ms) of each visit to a row, those set aside too where the row knows of when."""
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

    ``orders`` and ``levels`` (m,): looks at the sentinel and the logarithm of how slow it was against its
    typical self. ``share`` and ``bend``: of that, a step of t ms shows ``share + bend · log(t / at_ms)``:
    long steps see less of a short disturbance, and not all shapes suffer from the same. ``learnt``:
    from the rows' own visits; otherwise the share is what the sentinel's samples' scatter leaves.
    ``close``: there are looks beside the visits.
    """

    orders: FloatArray
    levels: FloatArray
    share: float = 0.0
    bend: float = 0.0
    at_ms: float = 1.0
    learnt: bool = False
    close: bool = False

    @classmethod
    def of(cls, rows: Sequence[StepRow]) -> MachineSpeed | None:
        """What these rows' sentinels say; None where there are too few, or several shapes of them."""
        reference_samples = sorted((r for r in rows if r.kind == "sentinel"), key=lambda r: r.order)
        if (
            len(reference_samples) < MINIMUM_SENTINELS
            or len({r.shape.key() for r in reference_samples}) != 1
        ):
            return None
        orders = np.array([r.order for r in reference_samples], dtype=np.float64)
        if len(np.unique(orders)) < len(orders):
            return None  # of several sweeps: their orders say nothing about each other
        levels = np.log([r.median_ms for r in reference_samples])
        share = _believed(reference_samples, levels)
        levels -= np.median(levels)
        groups = [list(visits_of(r)) for r in rows if r.kind != "sentinel"]
        blocks = sum(len(group) for group in groups)
        close = len(reference_samples) >= CLOSE * blocks
        plain = cls(orders, levels, share, close=close)
        return plain._learn([group for group in groups if len(group) > 1])

    def _learn(self, groups: Sequence[Sequence[tuple[int, tuple[float, ...]]]]) -> MachineSpeed:
        """Regress how visits to one shape differ on how the sentinel did between them."""
        freedom = sum(len(group) - 1 for group in groups)
        if freedom < MINIMUM_FREEDOM:
            return self
        moved, seen, size = [], [], []
        for group in groups:
            times = np.log([np.median(samples) for _, samples in group])
            level = self._at([order for order, _ in group])
            moved.append(times - times.mean())
            seen.append(level - level.mean())
            size.append(np.full(len(group), np.median(times)))
        y, x, t = (np.concatenate(part) for part in (moved, seen, size))
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
        at = float(np.exp(middle))
        share, bend = float(found[0]), float(found[1])
        return MachineSpeed(self.orders, self.levels, share, bend, at, True, self.close)

    def _at(self, orders: Sequence[int]) -> FloatArray:
        return np.asarray(np.interp(orders, self.orders, self.levels))

    def factors(self, orders: Sequence[int], ms: float) -> FloatArray:
        """How slow a step of ``ms`` was at these places, (n,), against the machine's typical pace."""
        share = self.share + self.bend * np.log(ms / self.at_ms) if self.learnt else self.share
        factors: FloatArray = np.exp(float(np.clip(share, 0.0, _MOST_SHARE)) * self._at(orders))
        return factors


def _believed(reference_samples: Sequence[StepRow], levels: FloatArray) -> float:
    """Share of the looks' variance that their samples' scatter does not explain, so that on a quiet machine
    the sentinel's own noise is not written into every row."""
    scatter = [
        np.var(np.log(r.samples_ms), ddof=1) / len(r.samples_ms)
        for r in reference_samples
        if len(r.samples_ms) > 1
    ]
    # A median is about half as precise again as a mean (π / 2 in variance).
    noise = 1.57 * float(np.mean(scatter)) if scatter else 0.0
    spread = float(np.var(levels, ddof=1))
    return max(0.0, 1.0 - noise / spread) if spread > 0 else 0.0


def drift_factors(rows: Sequence[StepRow], pace: MachineSpeed | None = None) -> FloatArray:
    """How slow the machine was at each row, (n,), against its typical speed; ones where unknown.

    The logarithm of the sentinel's median is interpolated over the order of measurement; a row measured
    in several visits has the mean of theirs.
    """
    pace = pace or MachineSpeed.of(rows)
    if pace is None:
        return np.ones(len(rows))
    factors = np.empty(len(rows))
    for number, row in enumerate(rows):
        blocks = list(visits_of(row))
        each = np.log(pace.factors([order for order, _ in blocks], row.median_ms))
        factors[number] = np.exp(np.average(each, weights=[len(s) for _, s in blocks]))
    return factors

"""What shots will cost: learned from a pilot, corrected by every visit of the sweep itself.

A visit is a frame (filling caches, giving them back, writing the row) and some fires. Both are learned apart,
as lines in the shots' work with no negative slope; a shot that was measured already is expected to
cost what it did. How many samples a shot will need follows from the noise seen so far.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from wispprof.errors import EngineError
from wispprof.hardware import NullSensors
from wispprof.profiling.measurement_log import half_width, relative_spread, samples_needed
from wispprof.profiling.workload import Runner, RunSamples, SweepSettings, Workload, run_repeatedly

__all__ = ["CostModel", "choose_probes", "nonnegative_fit", "pilot"]

Subject = TypeVar("Subject")

_FEW = 3


@dataclass
class _Seen:
    work: tuple[float, ...]
    blocks: int = 0
    frame_s: float = 0.0
    fires: int = 0
    fire_s: float = 0.0
    samples: list[float] = field(default_factory=list)


class CostModel(Generic[Subject]):
    """Seconds of visits and shots under these settings."""

    def __init__(self, settings: SweepSettings) -> None:
        self._settings = settings
        self._seen: dict[str, _Seen] = {}
        self._lines: tuple[np.ndarray, np.ndarray] | None = None
        self._fitted = 0
        self._spreads: dict[str, float] = {}
        self._typical: dict[int, float] = {}

    @property
    def probes(self) -> int:
        """Shots that were measured at least once."""
        return len(self._seen)

    def observe(self, workload: Workload[Subject], seconds: float, fires: RunSamples) -> None:
        """A visit that gave these fires took ``seconds`` in all."""
        seen = self._seen.setdefault(workload.key, _Seen(workload.work))
        fired_s = (sum(fires.warming) + sum(fires.samples)) / 1000
        count = len(fires.warming) + len(fires.samples)
        seen.blocks += 1
        seen.frame_s += max(0.0, seconds - fired_s - count * workload.rest_s)
        seen.fires += count
        seen.fire_s += fired_s
        seen.samples += fires.samples
        self._spreads[workload.key] = round(relative_spread(seen.samples), 3)
        self._typical.clear()

    def visit_s(self, workload: Workload[Subject], fires: int) -> float:
        """One visit with this many fires."""
        fire_s, frame_s = self._parts(workload)
        return frame_s + fires * (fire_s + workload.rest_s)

    def remaining(
        self, workload: Workload[Subject], have: Sequence[float] = (), taken: int = 0
    ) -> tuple[int, float]:
        """Visits and seconds until this shot, of which these undisturbed samples are there and ``taken`` in
        all, is finished."""
        settings = self._settings
        fire_s, frame_s = self._parts(workload)
        # A spent allowance ends a shot, but only after the samples of a whole visit.
        most = min(settings.most, max(_FEW, int(settings.shot_s / max(fire_s, 1e-9)) + 1))
        missing = min(self._needed(have, most) - len(have), most - taken)
        if missing <= 0:
            return 0, 0.0
        blocks = math.ceil(missing / settings.block)
        warm = blocks * min(1, settings.warmup) + (0 if have else max(0, settings.warmup - 1))
        fires = blocks * settings.block + warm
        return blocks, blocks * frame_s + fires * (fire_s + workload.rest_s)

    def plan_s(
        self,
        workloads: Sequence[tuple[Workload[Subject], Sequence[float], int]],
        sentinel: Workload[Subject] | None,
    ) -> tuple[int, float]:
        """Visits and seconds until all these shots are finished, looks at the sentinel included."""
        each = [self.remaining(workload, have, taken) for workload, have, taken in workloads]
        blocks, seconds = sum(v for v, _ in each), sum(s for _, s in each)
        if sentinel is not None and blocks:
            reference_samples = -(-blocks // self._settings.sentinel_every) + 1
            seconds += reference_samples * self.look_s(sentinel)
        return blocks, seconds

    def look_s(self, sentinel: Workload[Subject]) -> float:
        """One look at the sentinel."""
        return self.visit_s(
            sentinel, self._settings.reference_sample + self._settings.reference_warmup
        )

    def _needed(self, have: Sequence[float], most: int) -> float:
        """Samples a shot will need in all: by its own noise, or by that of all visits so far."""
        settings, least = self._settings, min(self._settings.least, most)
        if len(have) >= max(least, 6):
            if half_width(have) <= settings.target or len(have) >= most:
                return len(have)
            # Samples that fell badly once fall better with more; its own noise, not its bad luck.
            more = samples_needed(round(relative_spread(have), 3), settings.target, least, most)
            return max(len(have) + 1, more)
        if not self._seen:
            return least
        if most not in self._typical:
            self._typical[most] = statistics.fmean(
                samples_needed(spread, settings.target, least, most)
                for spread in self._spreads.values()
            )
        return self._typical[most]

    def _parts(self, workload: Workload[Subject]) -> tuple[float, float]:
        """Seconds of a fire and of a frame."""
        seen = self._seen.get(workload.key)
        if seen is not None:
            return seen.fire_s / seen.fires, seen.frame_s / seen.blocks
        if not self._seen:
            return 0.0, 0.0
        if self._lines is None or len(self._seen) >= 1.3 * self._fitted:
            self._fit()
        assert self._lines is not None
        run_once, frame = self._lines
        return float(np.dot(workload.work, run_once)), float(np.dot(workload.work, frame))

    def _fit(self) -> None:
        listed = list(self._seen.values())
        work = np.array([seen.work for seen in listed])
        run_once = [seen.fire_s / seen.fires for seen in listed]
        frame = [seen.frame_s / seen.blocks for seen in listed]
        self._lines = nonnegative_fit(work, run_once), nonnegative_fit(work, frame)
        self._fitted = len(listed)


def pilot(
    runner: Runner[Subject],
    workloads: Sequence[Workload[Subject]],
    sentinel: Workload[Subject] | None,
    settings: SweepSettings,
    clock: Callable[[], float] = time.perf_counter,
    probes: int | None = None,
    most_s: float = math.inf,
) -> CostModel[Subject]:
    """Visit a few far-apart shots twice each, one after the other; what they cost tells what all will.

    Twice, because samples of two visits differ more than those of one. ``probes`` None: a fifth of
    the shots, 6 to 12; no further once it took ``most_s``. What the backend refuses is left out.
    """
    started = clock()
    model: CostModel[Subject] = CostModel(settings)
    chosen = choose_probes(
        workloads, min(12, max(6, len(workloads) // 5)) if probes is None else probes
    )
    if sentinel is not None:
        chosen = [sentinel, *chosen]
    block = settings.block
    for workload in [*chosen, *chosen]:
        begin = clock()
        if model.probes and begin - started > most_s:
            break
        try:
            fires = run_repeatedly(runner, workload, 1, block, settings, clock, NullSensors())
        except EngineError:
            continue
        model.observe(workload, clock() - begin, fires)
    return model


def choose_probes(workloads: Sequence[Workload[Subject]], count: int) -> list[Workload[Subject]]:
    """Shots far apart in the logarithm of their work, the lightest first: corners, then the middle.

    Greedy farthest-point order; its first ``n`` cover the space about as well as any ``n`` can.
    """
    if not workloads:
        return []
    listed = sorted(workloads, key=lambda workload: (sum(workload.work), workload.key))
    points = np.log1p(np.array([workload.work for workload in listed], dtype=float))
    span = points.max(axis=0) - points.min(axis=0)
    points = points / np.where(span > 0, span, 1.0)
    order = [0]
    distance = np.linalg.norm(points - points[0], axis=1)
    while len(order) < min(count, len(listed)):
        far = int(distance.argmax())
        order.append(far)
        distance = np.minimum(distance, np.linalg.norm(points - points[far], axis=1))
        distance[order] = -1.0
    return [listed[index] for index in order]


def nonnegative_fit(work: np.ndarray, seconds: Sequence[float]) -> np.ndarray:
    """Least squares on relative error with no negative coefficient (n, f), (n,) → (f,).

    Coordinate descent: small, exact enough for an ETA.
    """
    target = np.asarray(seconds, dtype=float)
    scale = 1.0 / np.maximum(target, 1e-6)
    a, b = work * scale[:, None], target * scale
    size = np.linalg.norm(a, axis=0)
    a = a / np.where(size > 0, size, 1.0)
    # Over the few columns' products, in plain floats: the rows may be many, and arrays of five are slow.
    products, aims = (a.T @ a).tolist(), (a.T @ b).tolist()
    columns = [j for j in range(len(aims)) if size[j] > 0]
    x = [0.0] * len(aims)
    for _ in range(300):
        moved = 0.0
        for j in columns:
            others = sum(products[j][i] * x[i] for i in columns if i != j)
            new = max(0.0, aims[j] - others)
            moved, x[j] = max(moved, abs(new - x[j])), new
        if moved < 1e-9:
            break
    return np.asarray(x) / np.where(size > 0, size, 1.0)

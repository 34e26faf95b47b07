"""Predict what workloads cost: learned from a pilot, updated with every block of the sweep.

A block has a constant part (fill caches, release them, write the row) and a part per run. Both are fitted
as lines in the workloads' ``work`` without negative slopes; a workload that was measured is expected to
cost the same again. The noise so far predicts how many samples a workload needs.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from wispprof.artifacts.median_interval import half_width
from wispprof.errors import EngineError
from wispprof.hardware import Sensors
from wispprof.profiling.measurement_log import relative_spread, samples_needed
from wispprof.profiling.workload import MIN_BLOCK_SAMPLES, Runner, RunSamples, Workload, run_repeatedly
from wispprof.settings.profiler_settings import SweepSettings

Subject = TypeVar("Subject")

_REFIT_GROWTH = 1.3
"""The lines are fitted anew when this many times as many workloads were measured."""


@dataclass
class _Observed:
    work: tuple[float, ...]
    blocks: int = 0
    overhead_s: float = 0.0
    runs: int = 0
    runs_s: float = 0.0
    samples: list[float] = field(default_factory=list)

    @property
    def run_s(self) -> float:
        return self.runs_s / self.runs

    @property
    def block_overhead_s(self) -> float:
        return self.overhead_s / self.blocks


class CostModel(Generic[Subject]):
    """Seconds of blocks and workloads under these settings."""

    def __init__(self, settings: SweepSettings) -> None:
        self._settings = settings
        self._observed: dict[str, _Observed] = {}
        self._run_line = self._overhead_line = np.zeros(0)
        self._fitted_workloads = 0
        self._spreads: dict[str, float] = {}
        self._typical_samples: dict[int, float] = {}

    @property
    def probes(self) -> int:
        """Number of workloads measured so far."""
        return len(self._observed)

    def observe(self, workload: Workload[Subject], seconds: float, runs: RunSamples) -> None:
        """Learn from a block with these runs that took ``seconds`` in all."""
        seen = self._observed.setdefault(workload.key, _Observed(workload.work))
        runs_s = (sum(runs.warming) + sum(runs.samples)) / 1000
        count = len(runs.warming) + len(runs.samples)
        seen.blocks += 1
        seen.overhead_s += max(0.0, seconds - runs_s - count * workload.rest_s)
        seen.runs += count
        seen.runs_s += runs_s
        seen.samples += runs.samples
        self._spreads[workload.key] = round(relative_spread(seen.samples), 3)
        self._typical_samples.clear()

    def block_s(self, workload: Workload[Subject], runs: int) -> float:
        """Seconds of a block with this many runs."""
        run_s, overhead_s = self._run_and_overhead_s(workload)
        return overhead_s + runs * (run_s + workload.rest_s)

    def reference_s(self, sentinel: Workload[Subject]) -> float:
        """Seconds of one reference measurement."""
        settings = self._settings
        return self.block_s(sentinel, settings.reference_samples + settings.reference_warmup)

    def remaining(
        self, workload: Workload[Subject], clean: Sequence[float] = (), taken: int = 0
    ) -> tuple[int, float]:
        """Blocks and seconds until this workload is finished.

        ``clean``: its undisturbed samples; ``taken``: number of all its samples.
        """
        settings = self._settings
        run_s, overhead_s = self._run_and_overhead_s(workload)
        # max_workload_s ends a workload only after the samples of a whole block.
        affordable = max(MIN_BLOCK_SAMPLES, int(settings.max_workload_s / max(run_s, 1e-9)) + 1)
        max_samples = min(settings.max_samples, affordable)
        missing = min(self._needed(clean, max_samples) - len(clean), max_samples - taken)
        if missing <= 0:
            return 0, 0.0
        blocks = math.ceil(missing / settings.block)
        warmup = blocks * min(1, settings.warmup) + (0 if clean else max(0, settings.warmup - 1))
        runs = blocks * settings.block + warmup
        return blocks, blocks * overhead_s + runs * (run_s + workload.rest_s)

    def total(
        self,
        states: Sequence[tuple[Workload[Subject], Sequence[float], int]],
        sentinel: Workload[Subject] | None,
    ) -> tuple[int, float]:
        """Blocks and seconds until all workloads are finished, with the reference measurements.

        ``states``: the arguments of :meth:`remaining` for each workload.
        """
        each = [self.remaining(workload, clean, taken) for workload, clean, taken in states]
        blocks, seconds = sum(b for b, _ in each), sum(s for _, s in each)
        if sentinel is not None and blocks:
            references = -(-blocks // self._settings.sentinel_every) + 1
            seconds += references * self.reference_s(sentinel)
        return blocks, seconds

    def _needed(self, clean: Sequence[float], max_samples: int) -> float:
        """Samples that a workload needs in all, by its own noise or by that of all workloads."""
        settings, min_samples = self._settings, min(self._settings.min_samples, max_samples)
        if len(clean) >= max(min_samples, 6):
            if half_width(clean) <= settings.target or len(clean) >= max_samples:
                return len(clean)
            # By the spread rather than the present interval: an unlucky one narrows with more samples.
            spread = round(relative_spread(clean), 3)
            needed = samples_needed(spread, settings.target, min_samples, max_samples)
            return max(len(clean) + 1, needed)
        if not self._observed:
            return min_samples
        if max_samples not in self._typical_samples:
            self._typical_samples[max_samples] = statistics.fmean(
                samples_needed(spread, settings.target, min_samples, max_samples)
                for spread in self._spreads.values()
            )
        return self._typical_samples[max_samples]

    def _run_and_overhead_s(self, workload: Workload[Subject]) -> tuple[float, float]:
        """Seconds per run and per block."""
        seen = self._observed.get(workload.key)
        if seen is not None:
            return seen.run_s, seen.block_overhead_s
        if not self._observed:
            return 0.0, 0.0
        if not self._fitted_workloads or self.probes >= _REFIT_GROWTH * self._fitted_workloads:
            self._fit()
        work = workload.work
        return float(np.dot(work, self._run_line)), float(np.dot(work, self._overhead_line))

    def _fit(self) -> None:
        observed = list(self._observed.values())
        work = np.array([seen.work for seen in observed])
        self._run_line = fit_line(work, [seen.run_s for seen in observed])
        self._overhead_line = fit_line(work, [seen.block_overhead_s for seen in observed])
        self._fitted_workloads = len(observed)


def pilot(
    runner: Runner[Subject],
    workloads: Sequence[Workload[Subject]],
    sentinel: Workload[Subject] | None,
    settings: SweepSettings,
    clock: Callable[[], float] = time.perf_counter,
    probes: int | None = None,
    budget_s: float = math.inf,
) -> CostModel[Subject]:
    """Measure two blocks of a few dissimilar workloads, and learn the cost of all from them.

    Two passes, because samples of two blocks differ more than those of one. ``probes`` ``None``: a fifth of
    the workloads, 6 to 12. Starts no block after ``budget_s``. Workloads that the backend refuses are
    skipped.
    """
    started = clock()
    model: CostModel[Subject] = CostModel(settings)
    chosen = choose_probes(workloads, min(12, max(6, len(workloads) // 5)) if probes is None else probes)
    if sentinel is not None:
        chosen = [sentinel, *chosen]
    for workload in [*chosen, *chosen]:
        begin = clock()
        if model.probes and begin - started > budget_s:
            break
        try:
            runs = run_repeatedly(runner, workload, 1, settings.block, settings, clock, Sensors())
        except EngineError:
            continue
        model.observe(workload, clock() - begin, runs)
    return model


def choose_probes(workloads: Sequence[Workload[Subject]], count: int) -> list[Workload[Subject]]:
    """Workloads far apart in the logarithm of their work: the lightest first, then corners, then the
    middle.

    Greedy farthest-point order: the first ``n`` cover the space about as well as any ``n`` can.
    """
    if not workloads:
        return []
    ordered = sorted(workloads, key=lambda workload: (sum(workload.work), workload.key))
    points = np.log1p(np.array([workload.work for workload in ordered], dtype=float))
    span = points.max(axis=0) - points.min(axis=0)
    points = points / np.where(span > 0, span, 1.0)
    chosen = [0]
    distance = np.linalg.norm(points - points[0], axis=1)
    while len(chosen) < min(count, len(ordered)):
        farthest = int(distance.argmax())
        chosen.append(farthest)
        distance = np.minimum(distance, np.linalg.norm(points - points[farthest], axis=1))
        distance[chosen] = -1.0
    return [ordered[index] for index in chosen]


def fit_line(work: np.ndarray, seconds: Sequence[float]) -> np.ndarray:
    """Least squares on the relative error with nonnegative coefficients; (n, f), (n,) → (f,)."""
    from scipy.optimize import nnls

    target = np.asarray(seconds, dtype=float)
    weights = 1.0 / np.maximum(target, 1e-6)
    scaled = work * weights[:, None]
    norms = np.linalg.norm(scaled, axis=0)
    norms[norms == 0] = 1.0
    coefficients, _ = nnls(scaled / norms, target * weights)
    return np.asarray(coefficients / norms)

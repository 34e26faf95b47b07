"""How long shots will take: a few of them timed quickly, and a line with no negative slopes through them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from wispprof.hardware import NullSensors
from wispprof.profiling.sweep import Shooter, Shot, SweepSettings, repeat

__all__ = ["choose_probes", "expectation", "nonnegative_fit"]

Subject = TypeVar("Subject")

PROBE = SweepSettings(warmup=1, least=2, most=2, shot_s=1.0)


def expectation(
    shooter: Shooter[Subject],
    shots: Sequence[Shot[Subject]],
    sentinel: Shot[Subject],
    settings: SweepSettings,
    clock: Callable[[], float] = time.perf_counter,
    probes: int = 6,
) -> Callable[[Shot[Subject]], float]:
    """Time the sentinel in full and a few far-apart shots in brief; returns shot → expected seconds.

    A shot is expected to need as many repeats as the sentinel did: that is this machine's noise today.
    """
    samples, _ = repeat(shooter, sentinel, settings, clock, NullSensors())
    repeats = len(samples)
    chosen = choose_probes(shots, probes) or [sentinel]
    fire_s, frame_s = [], []
    for shot in chosen:
        begin = clock()
        times, _ = repeat(shooter, shot, PROBE, clock, NullSensors())
        fire = min(times) / 1000
        fire_s.append(fire)
        frame_s.append(max(0.0, clock() - begin - 3 * fire))
    work = np.array([shot.work for shot in chosen])
    firing, framing = nonnegative_fit(work, fire_s), nonnegative_fit(work, frame_s)

    def expect(shot: Shot[Subject]) -> float:
        one = float(np.dot(shot.work, firing))
        most = max(3.0, settings.shot_s / max(one, 1e-9))
        return float(np.dot(shot.work, framing)) + one * (
            settings.warmup + min(max(repeats, settings.least), most)
        )

    return expect


def choose_probes(shots: Sequence[Shot[Subject]], count: int) -> list[Shot[Subject]]:
    """Shots far apart in the logarithm of their work, the lightest first: corners, then the middle.

    Greedy farthest-point order; its first ``n`` cover the space about as well as any ``n`` can.
    """
    if not shots:
        return []
    listed = sorted(shots, key=lambda shot: (sum(shot.work), shot.key))
    points = np.log1p(np.array([shot.work for shot in listed], dtype=float))
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
    x = np.zeros(a.shape[1])
    for _ in range(300):
        for j in range(len(x)):
            rest = b - a @ x + a[:, j] * x[j]
            x[j] = max(0.0, float(a[:, j] @ rest)) if size[j] > 0 else 0.0
    return np.asarray(x / np.where(size > 0, size, 1.0))

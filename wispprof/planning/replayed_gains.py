"""What the formulas of :mod:`~wispprof.planning.session_speed` leave out, from answers that are served again.

The formulas describe endless sessions. They know nothing of drafts that an edge makes while its round is out,
of what its controller and the server's policy choose, nor of an answer's last round, which is cut short. The
simulator serves some answers of the trace to one device (:mod:`~wispprof.simulation.answer_replay`, as
`check-pair` does). The ratio to the formulas for these answers corrects every load.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from wispprof.artifacts.rows import AcceptanceTrace, TracePath
from wispprof.planning.session_speed import (
    LoadedStepTimes,
    Runs,
    SessionSpeed,
    round_speed,
    runs_of_trace,
    stream_speed,
    undrafted_speed,
)
from wispprof.simulation.answer_replay import (
    STREAM,
    UNDRAFTED,
    AnswerCounts,
    AnswerReplay,
    SessionSteps,
    rounds_of,
    total,
)
from wispprof.simulation.devices import DeviceProfile
from wispprof.simulation.scenario import System
from wispprof.simulation.trace_replay import TraceReplay

_ANSWERS = 8
_TOKENS = 384
"""Answers that are served again, and their tokens at most: 30 ms for each draft length."""
_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Draft lengths that are served; gains between them are interpolated."""


@dataclass(frozen=True, slots=True)
class Gain:
    """Factors on a session's tokens/ms and on the drafts that it makes for a committed token."""

    speed: float = 1.0
    drafted: float = 1.0

    def of(self, pace: SessionSpeed) -> SessionSpeed:
        """``pace`` with these factors."""
        return replace(
            pace,
            tokens_per_ms=pace.tokens_per_ms * self.speed,
            round_ms=pace.round_ms / self.speed,
            drafted=pace.drafted * self.drafted,
        )


class SampledAnswers(NamedTuple):
    """Some answers of a trace: their runs, and the answers themselves."""

    runs: Runs
    answers: TraceReplay


def sampled_answers(trace: AcceptanceTrace) -> SampledAnswers | None:
    """Some of the answers, from the whole of the trace; ``None`` if none is long enough."""
    paths = [path for path in trace.paths if path.scored_rows() > 0 and len(path.path) > 1]
    count = min(len(paths), _ANSWERS)
    chosen: list[TracePath] = []
    tokens = 0
    for number in range(count):
        path = paths[number * len(paths) // count]
        if chosen and tokens + len(path.path) > _TOKENS:
            break
        chosen.append(path)
        tokens += len(path.path)
    if not chosen:
        return None
    sample = replace(trace, paths=tuple(chosen))
    return SampledAnswers(runs_of_trace(sample)[0], AnswerReplay.of(sample))


def replayed_gains(
    sample: SampledAnswers,
    times: LoadedStepTimes,
    device: DeviceProfile,
    rtt_ms: float,
    mode: str,
    k_max: int,
) -> tuple[Gain, ...]:
    """Gains for k = 0 … ``k_max`` of one session alone. An asynchronous session's drafts are limited by its
    server's policy, so all k above 0 have the gain of the best."""
    runs = sample.runs
    draft_ms = device.step_ms(times.cached)
    steps = SessionSteps(lambda new: times.uniform(1, new)[0], lambda prompt: times.uniform(1, 1)[0])
    alone = DeviceProfile(device.name, draft_ms=draft_ms, resume_ms=device.resume_ms)
    replay = AnswerReplay(sample.answers, alone, rtt_ms)

    def served(system: System) -> AnswerCounts:
        return total(replay.serve(system, steps))

    undrafted = _gain(served(UNDRAFTED), undrafted_speed(times, 1))
    if mode == "round":
        known = [k for k in _LENGTHS if k < k_max] + [k_max]
        paces = [round_speed(times, 1, k, draft_ms, rtt_ms, runs, device.resume_ms) for k in known]
        gains = [_gain(served(rounds_of(k)), pace) for k, pace in zip(known, paces, strict=True)]
        every = np.arange(1, k_max + 1)
        speeds = np.interp(every, known, [gain.speed for gain in gains]).tolist()
        drafted = np.interp(every, known, [gain.drafted for gain in gains]).tolist()
        return (undrafted, *map(Gain, speeds, drafted))
    paces = [stream_speed(times, 1, k, draft_ms, rtt_ms, runs) for k in range(1, k_max + 1)]
    best = _gain(served(STREAM), max(paces, key=lambda pace: pace.tokens_per_ms))
    return (undrafted, *[best] * k_max)


def _gain(served: AnswerCounts, pace: SessionSpeed) -> Gain:
    later = max(1.0, served.tokens - served.answers)
    drafted = served.drafted / later / pace.drafted if pace.drafted else 1.0
    return Gain(served.later_tokens_per_s / pace.tokens_per_s, drafted)

"""What the formulas of :mod:`~wispprof.planning.session_speed` leave out, from answers that are served again.

The formulas describe endless sessions. They know nothing of drafts that an edge makes while its round is out,
of what its controller and the server's policy choose, nor of an answer's last round, which is cut short. The
simulator serves some answers of the trace to one device (:mod:`~wispprof.simulation.answer_replay`, as
`check-pair` does). The ratio to the formulas for these answers corrects every load.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from wispprof.artifacts.rows import AcceptanceTrace
from wispprof.planning.session_speed import (
    LoadedStepTimes,
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

_ANSWERS = 8
_TOKENS = 1024
"""Answers that are served again, and their tokens at most: milliseconds for each draft length."""


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


def sampled_answers(trace: AcceptanceTrace) -> AcceptanceTrace | None:
    """Some of the answers, from the whole of the trace; ``None`` if none is long enough."""
    paths = [path for path in trace.paths if path.scored_rows() > 0 and len(path.path) > 1]
    count = min(len(paths), _ANSWERS)
    chosen, tokens = [], 0
    for number in range(count):
        path = paths[number * len(paths) // count]
        if chosen and tokens + len(path.path) > _TOKENS:
            break
        chosen.append(path)
        tokens += len(path.path)
    return replace(trace, paths=tuple(chosen)) if chosen else None


def replayed_gains(
    sample: AcceptanceTrace,
    times: LoadedStepTimes,
    device: DeviceProfile,
    rtt_ms: float,
    mode: str,
    k_max: int,
) -> tuple[Gain, ...]:
    """Gains for k = 0 … ``k_max`` of one session alone. An asynchronous session's drafts are limited by its
    server's policy, so all k above 0 have the gain of the best."""
    runs, _ = runs_of_trace(sample)
    draft_ms = device.step_ms(times.cached)
    steps = SessionSteps(lambda new: times.uniform(1, new)[0], lambda prompt: times.uniform(1, 1)[0])
    alone = DeviceProfile(device.name, draft_ms=draft_ms, resume_ms=device.resume_ms)
    replay = AnswerReplay(sample, alone, rtt_ms)

    def served(system: System) -> AnswerCounts:
        return total(replay.serve(system, steps))

    undrafted = _gain(served(UNDRAFTED), undrafted_speed(times, 1))
    if mode == "round":
        drafted = [
            _gain(
                served(rounds_of(k)),
                round_speed(times, 1, k, draft_ms, rtt_ms, runs, device.resume_ms),
            )
            for k in range(1, k_max + 1)
        ]
        return (undrafted, *drafted)
    paces = [stream_speed(times, 1, k, draft_ms, rtt_ms, runs) for k in range(1, k_max + 1)]
    best = _gain(served(STREAM), max(paces, key=lambda pace: pace.tokens_per_ms))
    return (undrafted, *[best] * k_max)


def _gain(served: AnswerCounts, pace: SessionSpeed) -> Gain:
    later = max(1.0, served.tokens - served.answers)
    drafted = served.drafted / later / pace.drafted if pace.drafted else 1.0
    return Gain(served.later_tokens_per_s / pace.tokens_per_s, drafted)

"""Times of a pair, taken while draft and target take turns as they do in serving.

A draft step alone in a loop is faster than the first one after a pause and a commit. A target's step with k
drafts is slower than a plain one. So rounds of changing length are played along recorded answers, and each
step is timed in its place.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import TYPE_CHECKING, Protocol

import numpy as np

from wispprof.artifacts import TracePath
from wispprof.backends import Drafter
from wispprof.simulation.answer_replay import SessionSteps
from wispprof.types import Sampling, StepInput

if TYPE_CHECKING:
    from wispprof.engines.loading import LoadedModel

Clock = Callable[[], float]


class TargetSteps(Protocol):
    """One session of a target after the other."""

    def begin(self, prompt: Sequence[int]) -> tuple[float, int]:
        """Start a session; (ms of the prefill, the first token)."""

    def verify(self, drafts: Sequence[int]) -> tuple[float, Sequence[int]]:
        """(ms of a step with these drafts, the tokens that it committed)."""


class LocalTarget:
    """The verifier engine in this process."""

    def __init__(self, target: LoadedModel, sampling: Sampling, kv_tokens: int, clock: Clock) -> None:
        from wispprof.engines.torch.engine import TorchEngine

        self._engine = TorchEngine(target, kv_tokens=kv_tokens, max_sessions=1)
        self._sampling, self._clock = sampling, clock
        self._last: tuple[int, ...] = ()

    def begin(self, prompt: Sequence[int]) -> tuple[float, int]:
        for session in list(self._engine.sessions):
            self._engine.close(session)
        self._engine.open("check", self._sampling)
        ms, tokens = self._step(StepInput("check", list(prompt)))
        return ms, tokens[-1]

    def verify(self, drafts: Sequence[int]) -> tuple[float, Sequence[int]]:
        return self._step(StepInput("check", [*self._last, *drafts], drafts=len(drafts)))

    def _step(self, step: StepInput) -> tuple[float, Sequence[int]]:
        begin = self._clock()
        tokens = self._engine.step([step])[0].tokens
        ms = (self._clock() - begin) * 1000.0
        self._last = tuple(tokens[-1:])
        return ms, tokens


@dataclass
class PairTimes:
    """Samples in ms. ``first``: first draft steps of a round, which also read what was committed; ``later``:
    the other ones; ``beside``: such steps while the target computed, if that was measured. ``verify``: the
    target's steps by number of drafts. ``prefill`` and ``draft_prefill``: (prompt tokens, ms) of the target
    and of the draft. ``undrafted`` and ``undrafted_prefill``: tokens and prompts of a session without drafts,
    if they were measured apart."""

    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    verify: dict[int, list[float]] = field(default_factory=dict)
    prefill: list[tuple[int, float]] = field(default_factory=list)
    draft_prefill: list[tuple[int, float]] = field(default_factory=list)
    undrafted: list[float] = field(default_factory=list)
    undrafted_prefill: list[tuple[int, float]] = field(default_factory=list)

    @property
    def draft_ms(self) -> float:
        """Mean of a draft step after another. A mean, because a drafter may do the work of several steps in
        one of them."""
        return statistics.fmean(self.later or self.first or [0.0])

    @property
    def resume_ms(self) -> float:
        """What the first draft step of a round takes longer."""
        return max(0.0, statistics.fmean(self.first) - self.draft_ms) if self.first else 0.0

    @property
    def server_slowdown(self) -> float:
        """How many times longer a draft step takes while the target computes; never below 1."""
        if not (self.beside and self.later):
            return 1.0
        return max(1.0, statistics.fmean(self.beside) / self.draft_ms)

    @property
    def draft_prefill_ms_per_token(self) -> float:
        """Median over the prompts."""
        return statistics.median([ms / tokens for tokens, ms in self.draft_prefill] or [0.0])

    @property
    def target_ms(self) -> float:
        """A step of the target without drafts."""
        return self.estimator().step_ms(1)

    def verified(self, drafts: int, ms: float) -> None:
        """Note a step of the target."""
        self.verify.setdefault(drafts, []).append(ms)

    def estimator(self, undrafted: bool = False) -> SessionSteps:
        """The target's step times by what was measured; ``undrafted``: of a session without drafts."""
        if undrafted and self.undrafted:
            whole = statistics.fmean(self.undrafted)
            return measured_steps([(1, whole, len(self.undrafted))], self.undrafted_prefill or self.prefill)
        points = [
            (1 + drafts, statistics.median(samples), len(samples)) for drafts, samples in self.verify.items()
        ]
        return measured_steps(points, self.prefill)


def measured_steps(
    points: Sequence[tuple[int, float, int]], prefill: Sequence[tuple[int, float]]
) -> SessionSteps:
    """Steps of one session by its new tokens: an isotonic fit of medians, lines between and beyond.

    ``points``: (new tokens, median ms, samples). ``prefill``: (prompt tokens, ms); the line through them
    prices prompts.
    """
    from sklearn.isotonic import IsotonicRegression

    new, ms, samples = zip(*sorted(points), strict=True)
    rising = IsotonicRegression().fit_transform(new, ms, sample_weight=samples)
    decode = _Curve([(n, float(y)) for n, y in zip(new, rising, strict=True)])
    shortest, longest = min(prefill)[0], max(prefill)[0]
    if shortest < longest:
        slope, base = np.polyfit([n for n, _ in prefill], [ms for _, ms in prefill], 1)
        whole = _Curve([(n, float(max(0.0, base + slope * n))) for n in (shortest, longest)])
    else:  # one token costs a step
        middle = statistics.median(ms for _, ms in prefill)
        whole = _Curve([(1, min(middle, decode(1))), (max(2, longest), middle)])
    return SessionSteps(decode, whole)


class _Curve:
    def __init__(self, points: Sequence[tuple[int, float]]) -> None:
        ordered = sorted(points)
        self._x, self._y = (np.array(column, dtype=float) for column in zip(*ordered, strict=True))

    def __call__(self, new: int) -> float:
        x, y = self._x, self._y
        if new > x[-1] and len(x) > 1:
            slope = (y[-1] - y[0]) / (x[-1] - x[0])
            return float(y[-1] + slope * (new - x[-1]))
        return float(np.interp(new, x, y))


def rehearse(
    drafter: Drafter,
    target: TargetSteps,
    paths: Sequence[TracePath],
    depth: int,
    sampling: Sampling,
    clock: Clock = time.perf_counter,
) -> PairTimes:
    """Play rounds of 0 … ``depth`` drafts along the answers, in turn."""
    times = PairTimes()
    # Long rounds and short ones alternate, so that a slow minute falls upon all of them.
    lengths = cycle([*range(0, depth + 1, 2), *range(1, depth + 1, 2)])
    for path in paths:
        _play(drafter, target, path, lengths, sampling, times, clock)
    return times


def _play(
    drafter: Drafter,
    target: TargetSteps,
    path: TracePath,
    lengths: Iterator[int],
    sampling: Sampling,
    times: PairTimes,
    clock: Clock,
) -> None:
    begin = clock()
    drafter.open(path.prompt, sampling)
    drafter.prefill()
    times.draft_prefill.append((len(path.prompt), (clock() - begin) * 1000.0))
    ms, first = target.begin(path.prompt)
    times.prefill.append((len(path.prompt), ms))
    drafter.extend([first])
    left = len(path.path) - 1
    while left > 0:
        held = drafter.length
        drafts = _draft(drafter, min(next(lengths), left - 1), times, clock)
        ms, committed = target.verify(drafts)
        times.verified(len(drafts), ms)
        left -= len(committed)
        right = 0
        while right < min(len(drafts), len(committed)) and drafts[right] == committed[right]:
            right += 1
        drafter.rollback(held + right)
        drafter.extend(committed[right:])


def _draft(drafter: Drafter, count: int, times: PairTimes, clock: Clock) -> list[int]:
    drafts: list[int] = []
    while len(drafts) < count:
        begin = clock()
        if not drafter.can_draft:
            break
        token = drafter.draft().token
        (times.later if drafts else times.first).append((clock() - begin) * 1000.0)
        drafts.append(token)
    return drafts

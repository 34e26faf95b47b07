"""check-pair: is this draft worth serving with this target? From a short trace and the times of rounds.

The answers of the trace are played again in the simulator: with the session code of edge and server, the
recorded proposals, and the times that :mod:`~wispprof.profiling.pair_rehearsal` measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from wispprof.artifacts import AcceptanceTrace, TracePath
from wispprof.errors import ProfileError
from wispprof.profiling.pair_rehearsal import LocalTarget, PairTimes, rehearse
from wispprof.profiling.profile_run import load_pair_model
from wispprof.profiling.prompts import prompt_warning
from wispprof.profiling.traced_drafter import load_traced_draft
from wispprof.settings.profiler_settings import TraceSettings
from wispprof.simulation.answer_replay import (
    STREAM,
    UNDRAFTED,
    AnswerCounts,
    AnswerReplay,
    rounds_of,
    total,
)
from wispprof.simulation.devices import DeviceProfile
from wispprof.simulation.scenario import System
from wispprof.types import Progress

if TYPE_CHECKING:
    from wispprof.profiling.acceptance_trace import RemoteTarget

_RESAMPLES = 2000
_REHEARSED = 6
"""Answers along which rounds are timed."""
_BISECTIONS = 12


@dataclass(frozen=True)
class DraftLength:
    """``k`` drafts a round; 0: asynchronous drafting, whose controller chooses. ``accepted`` per round (per
    commit), and the speed of whole answers, their first token's wait included. ``low`` and ``high``,
    ``slow`` and ``fast``: the intervals in which their means lie at 95 %. ``later_tokens_per_s``: the speed
    after the first token, of which plans and SLOs speak."""

    k: int
    accepted: float
    low: float
    high: float
    tokens_per_s: float
    slow: float
    fast: float
    later_tokens_per_s: float

    @property
    def name(self) -> str:
        """For tables."""
        return str(self.k) if self.k else "ahead"


@dataclass(frozen=True)
class PairCheck:
    """``lengths``: synchronous drafting by draft length. ``ahead``: asynchronous drafting, by the controller
    and the policy that edges and servers use by default.

    ``target_ms``: one decode step of one session; ``verify_ms[k]``: one with k drafts. ``draft_ms``: a
    draft step; ``resume_ms``: what the first of a round takes longer. ``rtt_ms``: assumed.
    ``undrafted_*``: speeds of the target alone.
    ``prompt_warning``: whether prompts were not traced as they are served, or "".
    ``break_even_draft_ms``: draft step with which drafting is as fast as the target alone, 0 if no device is
    fast enough; ``None`` if drafting pays as it is.
    """

    prompts: int
    lengths: tuple[DraftLength, ...]
    ahead: DraftLength
    draft_ms: float
    resume_ms: float
    target_ms: float
    verify_ms: tuple[float, ...]
    rtt_ms: float
    undrafted_tokens_per_s: float
    undrafted_later_tokens_per_s: float
    prompt_warning: str = ""
    break_even_draft_ms: float | None = None

    @property
    def best(self) -> DraftLength:
        """The fastest way of drafting."""
        return max((*self.lengths, self.ahead), key=lambda length: length.tokens_per_s)

    @property
    def worthwhile(self) -> bool:
        """Whether drafting is faster than the target alone."""
        return self.best.tokens_per_s > self.undrafted_tokens_per_s

    @property
    def verdict(self) -> str:
        """The result in a sentence or two."""
        best = self.best
        ways = f"{best.k} drafts a round" if best.k else "drafting ahead"
        accepted = f"{best.accepted:.2f} accepted per round ({best.low:.2f} … {best.high:.2f}) with {ways}"
        if self.worthwhile:
            gain = best.tokens_per_s / self.undrafted_tokens_per_s
            return f"Worth serving: {accepted}, {gain:.2f} times the target alone."
        limit = self.break_even_draft_ms
        if not limit:
            return f"Not worth serving: {accepted}; round trip and verification cost more than that gains."
        return (
            f"Not worth serving on this device: {accepted}. A draft step takes {self.draft_ms:.1f} ms; "
            f"it pays below {limit:.1f} ms."
        )


def check_trace(trace: AcceptanceTrace, times: PairTimes, rtt_ms: float, seed: int = 0) -> PairCheck:
    """Serve the trace's answers in the simulator, with every draft length.

    Raises :class:`ProfileError` for a trace without answers of two tokens.
    """
    if not any(len(path.path) > 1 for path in trace.paths):
        raise ProfileError("The trace's answers are too short for a round.", "Give more --path-tokens.")
    played = _Played(trace, times, rtt_ms, seed)
    undrafted = played.serve(UNDRAFTED, 0)
    lengths = tuple(played.serve(rounds_of(k), k) for k in range(1, trace.depth + 1))
    estimator = times.estimator()
    found = PairCheck(
        len(trace.paths),
        lengths,
        played.serve(STREAM, 0),
        times.draft_ms,
        times.resume_ms,
        times.target_ms,
        tuple(estimator.step_ms(1 + k) for k in range(trace.depth + 1)),
        rtt_ms,
        undrafted.tokens_per_s,
        undrafted.later_tokens_per_s,
    )
    if found.worthwhile:
        return found
    return replace(found, break_even_draft_ms=played.break_even(found))


class _Played:
    """A trace's answers, served one after the other to one device."""

    def __init__(self, trace: AcceptanceTrace, times: PairTimes, rtt_ms: float, seed: int) -> None:
        self._steps = {undrafted: times.estimator(undrafted) for undrafted in (False, True)}
        self._seed = seed
        self._replay = AnswerReplay(
            AnswerReplay.of(trace),
            DeviceProfile(
                "device",
                draft_ms=max(times.draft_ms, 1e-3),
                resume_ms=times.resume_ms,
                steps_ms=tuple(max(ms, 1e-3) for ms in times.later),
                server_slowdown=times.server_slowdown,
                prefill_ms_per_token=times.draft_prefill_ms_per_token,
            ),
            rtt_ms,
        )

    def serve(self, system: System, k: int, speed: float = 1.0) -> DraftLength:
        """``speed``: factor on the draft's times."""
        device = self._replay.device
        device = replace(
            device,
            draft_ms=device.draft_ms * speed,
            resume_ms=device.resume_ms * speed,
            steps_ms=tuple(ms * speed for ms in device.steps_ms),
        )
        answers = replace(self._replay, device=device).serve(system, self._steps[system is UNDRAFTED])
        found, generator = total(answers), np.random.default_rng(self._seed)
        picks = generator.integers(0, len(answers), (_RESAMPLES, len(answers)))
        resampled = [AnswerCounts(*sums) for sums in np.array(answers)[picks].sum(1).tolist()]
        accepted = [sums.accepted / max(1.0, sums.rounds) for sums in resampled]
        low, high = np.quantile(accepted, (0.025, 0.975))
        slow, fast = np.quantile([sums.tokens_per_s for sums in resampled], (0.025, 0.975))
        return DraftLength(
            k,
            found.accepted / max(1.0, found.rounds),
            float(low),
            float(high),
            found.tokens_per_s,
            float(slow),
            float(fast),
            found.later_tokens_per_s,
        )

    def break_even(self, found: PairCheck) -> float:
        """Draft step (ms) with which the best way of drafting is as fast as the target alone."""
        ways = [(rounds_of(one.k), one.k) for one in found.lengths] + [(STREAM, 0)]

        def pays(speed: float) -> bool:
            return any(
                self.serve(system, k, speed).tokens_per_s > found.undrafted_tokens_per_s for system, k in ways
            )

        low, high = 0.0, 1.0
        if not pays(1e-3):
            return 0.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2.0
            low, high = (middle, high) if pays(max(middle, 1e-3)) else (low, middle)
        return low * self._replay.device.draft_ms


def run_check(
    settings: TraceSettings,
    server: RemoteTarget | None = None,
    rtt_ms: float = 30.0,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> PairCheck:
    """Take a short trace, time rounds of the pair, and judge.

    ``server``: a running server whose target is asked over the wire. Raises what tracing raises.
    """
    from wispprof.profiling import acceptance_trace

    sampling = settings.sampling
    if server is None:
        target = load_pair_model(settings.target, "target", settings.dtype, settings.device)
        draft = load_traced_draft(settings, target.tokenizer)
        trace = acceptance_trace.collect_trace(target, draft, settings, progress)
        paths = _chosen(trace)
        kv_tokens = max(len(path.prompt) for path in paths) + settings.path_tokens + settings.depth + 1
        local = LocalTarget(target, sampling, kv_tokens, clock)
        times = rehearse(draft.drafter(), local, paths, trace.depth, sampling, clock)
    else:
        from wispprof.profiling.pair_remote import rehearse_remote

        draft = load_traced_draft(settings)
        trace = acceptance_trace.trace_remote(server, settings, progress, draft=draft)
        times = rehearse_remote(
            server.server,
            server.access,
            draft.drafter(),
            _chosen(trace),
            trace.depth,
            sampling,
            rtt_ms,
            timeout_s=server.timeout_s,
            clock=clock,
        )
    found = check_trace(trace, times, rtt_ms, settings.seed)
    return replace(found, prompt_warning=prompt_warning(trace.meta, settings.prompt_tokens))


def _chosen(trace: AcceptanceTrace) -> Sequence[TracePath]:
    """Answers to be played: those of two tokens and more."""
    return [path for path in trace.paths if len(path.path) > 1][:_REHEARSED]

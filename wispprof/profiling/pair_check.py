"""check-pair: is this draft worth serving with this target? From a short trace and a few step times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from wispprof.artifacts import AcceptanceTrace
from wispprof.backends import Drafter
from wispprof.errors import ProfileError
from wispprof.profiling.profile_run import load_pair_model
from wispprof.profiling.traced_drafter import load_traced_draft
from wispprof.settings.profiler_settings import TraceSettings
from wispprof.types import Progress, Sampling, StepInput

if TYPE_CHECKING:
    from wispprof.engines.loading import LoadedModel
    from wispprof.profiling.acceptance_trace import RemoteTarget

_RESAMPLES = 2000
_WARM_UP, _STEPS = 3, 16


@dataclass(frozen=True)
class DraftLength:
    """Rounds of ``k`` drafts: ``accepted`` per round with the interval that its mean lies in at 95 %, and the
    session's speed in synchronous drafting."""

    k: int
    accepted: float
    low: float
    high: float
    tokens_per_s: float


@dataclass(frozen=True)
class PairCheck:
    """``lengths``: by draft length. ``undrafted_tokens_per_s``: the target alone.

    ``target_ms``: one decode step of one session. ``draft_ms``: a draft step. ``rtt_ms``: assumed.
    """

    prompts: int
    lengths: tuple[DraftLength, ...]
    draft_ms: float
    target_ms: float
    rtt_ms: float
    undrafted_tokens_per_s: float

    @property
    def best(self) -> DraftLength:
        """The fastest draft length."""
        return max(self.lengths, key=lambda length: length.tokens_per_s)

    @property
    def worthwhile(self) -> bool:
        """Whether drafting is faster than the target alone."""
        return self.best.tokens_per_s > self.undrafted_tokens_per_s

    @property
    def break_even_draft_ms(self) -> float:
        """Draft step with which drafting is as fast as the target alone; 0 if no device is fast enough."""
        return max(
            0.0,
            max(
                ((1.0 + one.accepted) * self.target_ms - self.rtt_ms - self.target_ms) / one.k
                for one in self.lengths
            ),
        )

    @property
    def verdict(self) -> str:
        """The result in a sentence or two."""
        best = self.best
        accepted = (
            f"{best.accepted:.2f} of {best.k} drafts accepted per round ({best.low:.2f} … {best.high:.2f})"
        )
        if self.worthwhile:
            gain = best.tokens_per_s / self.undrafted_tokens_per_s
            return f"Worth serving: {accepted}, {gain:.2f} times the target alone."
        limit = self.break_even_draft_ms
        if limit <= 0:
            return f"Not worth serving: {accepted}; the round trip of {self.rtt_ms:g} ms costs more."
        return (
            f"Not worth serving on this device: {accepted}. A draft step takes {self.draft_ms:.1f} ms; "
            f"it pays below {limit:.1f} ms."
        )


def check_trace(
    trace: AcceptanceTrace, draft_ms: float, target_ms: float, rtt_ms: float, seed: int = 0
) -> PairCheck:
    """Play rounds of every draft length along the trace's paths.

    A round takes its drafts one after the other, the round trip, and a step of the target, which is taken to
    last as long with drafts as without. Raises :class:`ProfileError` for a trace without rounds.
    """
    generator = np.random.default_rng(seed)
    lengths = []
    for k in range(1, trace.depth + 1):
        counts = np.array([_rounds(path.accepted, k) for path in trace.paths], dtype=float)
        accepted, rounds = counts.T
        if rounds.sum() == 0:
            raise ProfileError("The trace's paths are too short for a round.", "Give more --path-tokens.")
        picks = generator.integers(0, len(counts), (_RESAMPLES, len(counts)))
        means = accepted[picks].sum(1) / np.maximum(1.0, rounds[picks].sum(1))
        low, high = np.quantile(means, (0.025, 0.975))
        mean = float(accepted.sum() / rounds.sum())
        round_ms = k * draft_ms + rtt_ms + target_ms
        lengths.append(DraftLength(k, mean, float(low), float(high), 1000.0 * (1.0 + mean) / round_ms))
    return PairCheck(len(trace.paths), tuple(lengths), draft_ms, target_ms, rtt_ms, 1000.0 / target_ms)


def run_check(
    settings: TraceSettings,
    server: RemoteTarget | None = None,
    rtt_ms: float = 30.0,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> PairCheck:
    """Take a short trace, time the draft's and the target's steps, and judge.

    ``server``: a running server whose target is asked over the wire; its step time is then that of an
    undrafted session. Raises what tracing raises.
    """
    from wispprof.profiling import acceptance_trace

    if server is None:
        target = load_pair_model(settings.target, "target", settings.dtype, settings.device)
        draft = load_traced_draft(settings, target.tokenizer)
        trace = acceptance_trace.collect_trace(target, draft, settings, progress)
        target_ms = target_step_ms(target, trace.paths[0].prompt, clock)
    else:
        draft = load_traced_draft(settings)
        trace = acceptance_trace.trace_remote(server, settings, progress, draft=draft)
        begin = clock()
        path = server.paths([trace.paths[0].prompt], settings.sampling, settings.path_tokens)[0]
        target_ms = (clock() - begin) * 1000.0 / len(path)
    draft_ms = draft_step_ms(draft.drafter(), trace.paths[0].prompt, clock)
    return check_trace(trace, draft_ms, target_ms, rtt_ms, settings.seed)


def target_step_ms(
    target: LoadedModel, prompt: Sequence[int], clock: Callable[[], float] = time.perf_counter
) -> float:
    """Median time of a decode step of one session after ``prompt``."""
    from wispprof.engines.torch.engine import TorchEngine

    engine = TorchEngine(target, kv_tokens=len(prompt) + _WARM_UP + _STEPS + 1, max_sessions=1)
    engine.open("check", Sampling())
    last = engine.step([StepInput("check", list(prompt))])[0].tokens[-1:]
    samples = []
    for _ in range(_WARM_UP + _STEPS):
        begin = clock()
        last = engine.step([StepInput("check", last)])[0].tokens
        samples.append((clock() - begin) * 1000.0)
    return statistics.median(samples[_WARM_UP:])


def _rounds(accepted: Sequence[int] | np.ndarray, k: int) -> tuple[int, int]:
    """(drafts accepted, rounds) along one path. Rounds that its end cuts short do not count."""
    place = total = rounds = 0
    while place + k < len(accepted):
        right = min(int(accepted[place]), k)
        total, rounds, place = total + right, rounds + 1, place + right + 1
    return total, rounds


def draft_step_ms(
    drafter: Drafter, prompt: Sequence[int], clock: Callable[[], float] = time.perf_counter
) -> float:
    """Median time of a draft step after ``prompt``; 0 if there is nothing to propose."""
    drafter.open(prompt, Sampling())
    drafter.prefill()
    samples = []
    for _ in range(_WARM_UP + _STEPS):
        begin = clock()
        if not drafter.can_draft:
            break
        drafter.draft()
        samples.append((clock() - begin) * 1000.0)
    return statistics.median(samples[_WARM_UP:] or samples or [0.0])

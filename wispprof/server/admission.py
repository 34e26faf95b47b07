"""How many tokens per second a key may use: a bucket that fills at that rate.

Who is let in. Told at once, with what would be possible instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from wispprof.errors import RuntimeFault
from wispprof.server.session import SessionRequest
from wispprof.server.session_manager import SessionManager
from wispprof.server.step_time_tracker import StepTimeTracker
from wispprof.settings.server_settings import ServerSettings
from wispprof.types import BatchCost, ServedModel, Slo, StepTimeEstimator

__all__ = [
    "Admission",
    "Refused",
    "TokenBudget",
    "Utilisation",
]

_BURST_S = 20.0


class TokenBudget:
    """A bucket per key holding up to twenty seconds of its rate. ``rate`` 0: no limit."""

    def __init__(self, tokens_per_s: float) -> None:
        self.rate = tokens_per_s
        self._left: dict[str, tuple[float, float]] = {}

    def spend(self, key: str, tokens: int, now_ms: float) -> None:
        """Book tokens that were prefilled or committed; the bucket may go below empty."""
        if self.rate > 0:
            self._left[key] = (self._now(key, now_ms) - tokens, now_ms)

    def wait_ms(self, key: str, now_ms: float) -> float:
        """How long until the key may ask again; 0 if it may now."""
        if self.rate <= 0:
            return 0.0
        return max(0.0, -self._now(key, now_ms) / self.rate * 1000.0)

    def _now(self, key: str, now_ms: float) -> float:
        full = self.rate * _BURST_S
        left, since = self._left.get(key, (full, now_ms))
        return min(full, left + (now_ms - since) / 1000.0 * self.rate)


_MAX_TPOT_MS = 60_000.0
"""A promise of less than a token per minute is none."""


class Refused(RuntimeFault):
    """A request that is not taken. ``code`` as in :class:`~wispprof.protocol.Problem`;
    ``nearest_tokens_per_s``: the speed that could be kept, 0 where that is not the matter."""

    def __init__(
        self,
        code: str,
        message: str,
        hint: str = "",
        retry_ms: float = 0.0,
        nearest_tokens_per_s: float = 0.0,
    ) -> None:
        super().__init__(message, hint)
        self.code = code
        self.retry_ms = retry_ms
        self.nearest_tokens_per_s = nearest_tokens_per_s


@dataclass(frozen=True, slots=True)
class Utilisation:
    """Share of time that steps need so that every session gets its token speed, undrafted.

    With steps as often as the fastest session needs them, the fixed part of a step is paid once per
    its TPOT, and each session's own part once per its own. Drafting only lowers this where it pays, so
    the answer is a safe one. ``fastest_ms``: least TPOT; ``own``: the sessions' own parts.
    """

    fixed_ms: float
    fastest_ms: float
    own: float
    batch: BatchCost

    @classmethod
    def of(cls, estimator: StepTimeEstimator, slos: Iterable[tuple[float, int]]) -> Utilisation:
        """``slos``: (tpot ms, cached tokens) of each session."""
        batch = estimator.start().add(1, 0)
        fixed = before = batch.p50_ms
        fastest, own = math.inf, 0.0
        for tpot, cached in slos:
            batch = batch.add(1, cached)
            own += (batch.p50_ms - before) / tpot
            before = batch.p50_ms
            fastest = min(fastest, tpot)
        return cls(fixed, fastest, own, batch)

    @property
    def share(self) -> float:
        return self.own + self.fixed_ms / self.fastest_ms

    def with_one(self, cached: int) -> Callable[[float], float]:
        """The share with one more session of so many cached tokens, as a function of its TPOT."""
        grown = self.batch.add(1, cached).p50_ms - self.batch.p50_ms

        def share(tpot_ms: float) -> float:
            fastest = min(self.fastest_ms, tpot_ms)
            return self.own + self.fixed_ms / fastest + grown / tpot_ms

        return share


class Admission:
    """Checks requests against hard limits, per-key limits, queue bounds, and the estimator."""

    def __init__(
        self,
        settings: ServerSettings,
        manager: SessionManager,
        clock: StepTimeTracker,
        model: ServedModel,
    ) -> None:
        self._settings = settings
        self._manager = manager
        self._clock = clock
        self._model = model
        self.budget = TokenBudget(settings.tokens_per_key_per_s)

    def check(
        self, request: SessionRequest, key: str, now_ms: float, draining: bool
    ) -> SessionRequest:
        """The request, clipped to what can be; raises :class:`Refused`."""
        if draining:
            raise Refused("draining", "The server is shutting down.", "Try another server.")
        request = self._check_request(request)
        self._check_limits(key, now_ms)
        if self._settings.admit == "slo":
            self._check_slo(request, now_ms)
        return request

    def _check_request(self, request: SessionRequest) -> SessionRequest:
        length = len(request.tokens)
        max_prompt = min(self._model.max_context, self._manager.kv_total) - 1
        if self._settings.max_prompt:
            max_prompt = min(max_prompt, self._settings.max_prompt)
        if not length:
            raise Refused("frame", "A session needs at least one token.", "Send a prompt.")
        if length > max_prompt:
            raise Refused(
                "limit",
                f"The prompt has {length} tokens; at most {max_prompt} are taken.",
                "Shorten it.",
            )
        if min(request.tokens) < 0 or max(request.tokens) >= self._model.vocab_size:
            raise Refused(
                "frame",
                f"The prompt holds a token outside the vocabulary of {self._model.vocab_size}.",
                "Use this model's tokenizer.",
            )
        if not 0 <= request.generated < length:
            raise Refused(
                "frame", f"{length} tokens cannot hold {request.generated} generated ones."
            )
        if request.max_new <= request.generated:
            raise Refused("frame", "max_new leaves nothing to generate.", "Ask for more tokens.")
        room = min(self._model.max_context, self._manager.kv_total) - length + request.generated
        max_new = min(request.max_new, self._settings.max_new, room)
        if max_new <= request.generated:
            raise Refused(
                "limit",
                f"This session already has the most output a session may have ({max_new} tokens).",
            )
        return replace(request, max_new=max_new)

    def _check_limits(self, key: str, now_ms: float) -> None:
        settings, manager = self._settings, self._manager
        wait_ms = self.budget.wait_ms(key, now_ms)
        if wait_ms > 0:
            raise Refused(
                "limit",
                f"This key has used its {self.budget.rate:g} tokens/s.",
                "Retry later.",
                retry_ms=wait_ms,
            )
        mine = sum(1 for session in manager.sessions if session.listener.key == key)
        if mine >= settings.sessions_per_key:
            raise Refused(
                "limit",
                f"This key holds {mine} sessions, which is its limit.",
                "Close some first.",
                retry_ms=1_000.0,
            )
        waiting = sum(
            1 for session in manager.sessions if session.state.slo_tracker.first_ms is None
        )
        if len(manager) >= settings.max_sessions or waiting >= settings.max_waiting:
            raise Refused(
                "busy",
                f"The server holds {len(manager)} sessions, {waiting} of them waiting.",
                "Retry later.",
                retry_ms=self._retry_ms(),
            )

    def _retry_ms(self) -> float:
        """When a session may have ended: the soonest by its promised pace, within a second or so."""
        left = [
            session.state.tokens_left * session.state.slo.tpot_ms
            for session in self._manager.sessions
        ] or [0.0]
        return min(5_000.0, max(100.0, min(left)))

    # --- promises -----------------------------------------------------------------------------

    def _check_slo(self, request: SessionRequest, now_ms: float) -> None:
        estimator = self._clock.estimator
        # What prompts take, and what a step takes beyond its median, is not there for promises.
        limit = self._settings.admit_load / self._clock.cycle_ratio - self._clock.prefill_load(
            now_ms
        )
        others = [
            (session.state.slo.tpot_ms, session.state.committed_len)
            for session in self._manager.sessions
            if not session.closing
        ]
        cached = len(request.tokens) + (request.max_new - request.generated) // 2
        load = Utilisation.of(estimator, others).with_one(cached)
        if load(request.slo.tpot_ms) > limit:
            self._refuse_speed(request.slo, load, limit)
        self._check_ttft(request, estimator, others)

    def _refuse_speed(self, slo: Slo, load: Callable[[float], float], limit: float) -> None:
        slow, fast = max(_MAX_TPOT_MS, slo.tpot_ms), slo.tpot_ms
        if load(slow) > limit:
            raise Refused(
                "busy",
                "The server is full: no token speed can be promised now.",
                "Retry later.",
                retry_ms=self._retry_ms(),
            )
        for _ in range(24):
            middle = math.sqrt(slow * fast)
            if load(middle) > limit:
                fast = middle
            else:
                slow = middle
        nearest = math.floor(1e5 / slow) / 100.0
        raise Refused(
            "slo",
            f"{slo.tokens_per_s:g} tokens/s cannot be kept now; {nearest:g} tokens/s can.",
            "Ask for that, or retry later.",
            retry_ms=self._retry_ms(),
            nearest_tokens_per_s=nearest,
        )

    def _check_ttft(
        self,
        request: SessionRequest,
        estimator: StepTimeEstimator,
        others: list[tuple[float, int]],
    ) -> None:
        if request.slo.ttft_ms is None:
            return
        chunk = self._settings.prefill_chunk
        backlog = len(request.tokens) + sum(
            session.state.prompt_left for session in self._manager.sessions if not session.closing
        )
        batch = estimator.start()
        for _, cached in others:
            batch = batch.add(1, cached)
        steps = math.ceil(backlog / chunk)
        step_ms = batch.add(min(chunk, backlog), len(request.tokens) // 2, True).p50_ms
        needed = steps * step_ms
        if needed > request.slo.ttft_ms:
            raise Refused(
                "slo",
                f"A first token within {request.slo.ttft_ms:.0f} ms cannot be kept now; "
                f"{needed:.0f} ms can.",
                "Ask for that, or retry later.",
                retry_ms=self._retry_ms(),
            )

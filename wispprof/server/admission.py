"""Which requests are admitted; a refusal names what would be admitted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from wispprof.errors import RuntimeFault
from wispprof.server.session_manager import SessionManager
from wispprof.server.step_time_tracker import StepTimeTracker
from wispprof.settings.server_settings import ServerSettings
from wispprof.types import BatchCost, GenerationRequest, ServedModel, Slo, StepTimeEstimator

_MAX_TOKEN = 1 << 31
_BURST_S = 20.0
_MAX_TPOT_MS = 60_000.0
"""A speed below one token per minute is not worth offering."""


class TokenBudget:
    """Token bucket per API key: ``tokens_per_s`` (0: no limit), up to twenty seconds of them at once."""

    def __init__(self, tokens_per_s: float) -> None:
        self.tokens_per_s = tokens_per_s
        self._levels: dict[str, tuple[float, float]] = {}

    def spend(self, key: str, tokens: int, now_ms: float) -> None:
        """Count tokens prefilled or committed; the bucket may go below empty."""
        if self.tokens_per_s > 0:
            self._levels[key] = (self._level(key, now_ms) - tokens, now_ms)

    def wait_ms(self, key: str, now_ms: float) -> float:
        """Time until the key may open a session; 0 if it may now."""
        if self.tokens_per_s <= 0:
            return 0.0
        return max(0.0, -self._level(key, now_ms) / self.tokens_per_s * 1000.0)

    def _level(self, key: str, now_ms: float) -> float:
        full = self.tokens_per_s * _BURST_S
        level, since_ms = self._levels.get(key, (full, now_ms))
        return min(full, level + (now_ms - since_ms) / 1000.0 * self.tokens_per_s)


class Refused(RuntimeFault):
    """A request that is not admitted. ``code``: see :class:`~wispprof.protocol.Problem`.
    ``nearest_tokens_per_s``: the speed that would be admitted, 0 if speed is not the reason."""

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
class Utilization:
    """Share of time that steps need to give every session its token speed without drafts.

    Steps run as often as the fastest session needs them. Their fixed part is paid once per the smallest
    TPOT (``fastest_ms``), each session's own part once per its own TPOT (summed in ``own``).
    """

    fixed_ms: float
    fastest_ms: float
    own: float
    batch: BatchCost

    @classmethod
    def of(cls, estimator: StepTimeEstimator, sessions: Iterable[tuple[float, int]]) -> Utilization:
        """``sessions``: (TPOT in ms, cached tokens) of each."""
        batch = estimator.start().add(1, 0)
        fixed = before = batch.p50_ms
        fastest, own = math.inf, 0.0
        for tpot_ms, cached in sessions:
            batch = batch.add(1, cached)
            own += (batch.p50_ms - before) / tpot_ms
            before = batch.p50_ms
            fastest = min(fastest, tpot_ms)
        return cls(fixed, fastest, own, batch)

    @property
    def share(self) -> float:
        return self.own + self.fixed_ms / self.fastest_ms

    def with_one_more(self, cached: int) -> Callable[[float], float]:
        """The share with one more session of ``cached`` tokens, as a function of its TPOT in ms."""
        added_ms = self.batch.add(1, cached).p50_ms - self.batch.p50_ms

        def share(tpot_ms: float) -> float:
            fastest = min(self.fastest_ms, tpot_ms)
            return self.own + self.fixed_ms / fastest + added_ms / tpot_ms

        return share


class Admission:
    """Checks requests against hard limits, limits per key, queue bounds and the estimator."""

    def __init__(
        self,
        settings: ServerSettings,
        manager: SessionManager,
        step_times: StepTimeTracker,
        model: ServedModel,
    ) -> None:
        self._settings = settings
        self._manager = manager
        self._step_times = step_times
        self._model = model
        self.budget = TokenBudget(settings.tokens_per_key_per_s)

    @property
    def _context(self) -> int:
        return min(self._model.max_context, self._manager.kv_total)

    @property
    def max_prompt(self) -> int:
        """Longest prompt, in tokens."""
        return min(self._context - 1, self._settings.max_prompt or self._context)

    def check(self, request: GenerationRequest, key: str, now_ms: float, draining: bool) -> GenerationRequest:
        """The request with ``max_new`` cut to what is possible. Raises :class:`Refused`."""
        if draining:
            raise Refused("draining", "The server is shutting down.", "Try another server.")
        request = self._check_request(request)
        self._check_limits(key, now_ms)
        if self._settings.admit == "slo":
            self._check_slo(request, now_ms)
        return request

    def _check_request(self, request: GenerationRequest) -> GenerationRequest:
        length = len(request.tokens)
        context, max_prompt = self._context, self.max_prompt
        if not length:
            raise Refused("frame", "A session needs at least one token.", "Send a prompt.")
        sampling = request.sampling
        if self._manager.greedy_only and (sampling.temperature > 0 or sampling.logprobs is not None):
            raise Refused("frame", "This server's engine is greedy.", "Request temperature 0, no logprobs.")
        if length > max_prompt:
            raise Refused(
                "limit",
                f"The prompt has {length} tokens; this server takes at most {max_prompt}.",
                "Shorten it.",
            )
        if min(request.tokens) < 0 or max(request.tokens) >= self._model.vocab_size:
            raise Refused(
                "frame",
                f"The prompt holds a token outside the vocabulary of {self._model.vocab_size}.",
                "Use this model's tokenizer.",
            )
        if request.stop_tokens and not 0 <= min(request.stop_tokens) <= max(request.stop_tokens) < _MAX_TOKEN:
            raise Refused("frame", "A stop token is no token id.", "Use this model's tokenizer.")
        if not 0 <= request.generated < length:
            raise Refused("frame", f"{length} tokens cannot hold {request.generated} generated ones.")
        if request.max_new <= request.generated:
            raise Refused("frame", "max_new leaves no token to generate.", "Request more tokens.")
        remaining = context - length + request.generated
        max_new = min(request.max_new, self._settings.max_new, remaining)
        if max_new <= request.generated:
            raise Refused("limit", f"The session has reached this server's maximum output: {max_new} tokens.")
        return replace(request, max_new=max_new)

    def _check_limits(self, key: str, now_ms: float) -> None:
        settings, manager = self._settings, self._manager
        wait_ms = self.budget.wait_ms(key, now_ms)
        if wait_ms > 0:
            raise Refused(
                "limit",
                f"This key has used its {self.budget.tokens_per_s:g} tokens/s.",
                "Retry later.",
                retry_ms=wait_ms,
            )
        of_key = sum(1 for session in manager.sessions if session.listener.key == key)
        if of_key >= settings.sessions_per_key:
            raise Refused(
                "limit",
                f"This key holds {of_key} sessions, which is its limit.",
                "Close some first.",
                retry_ms=1_000.0,
            )
        waiting = sum(1 for one in manager.sessions if one.state.slo_tracker.first_ms is None)
        if len(manager) >= settings.max_sessions or waiting >= settings.max_waiting:
            raise Refused(
                "busy",
                f"The server holds {len(manager)} sessions, {waiting} of them waiting.",
                "Retry later.",
                retry_ms=self._retry_ms(),
            )

    def _retry_ms(self) -> float:
        """When the first session may have ended at its SLO's speed, between 0.1 s and 5 s."""
        states = [session.state for session in self._manager.sessions]
        first = min((one.tokens_left * one.slo.tpot_ms for one in states), default=0.0)
        return min(5_000.0, max(100.0, first))

    # --- SLO ----------------------------------------------------------------------------------

    def _check_slo(self, request: GenerationRequest, now_ms: float) -> None:
        if request.slo.best_effort and request.slo.ttft_ms is None:
            return
        step_times = self._step_times
        # Prefill, and what steps take beyond their median, leave less time for decoding.
        limit = self._settings.admit_load / step_times.cycle_ratio - step_times.prefill_load(now_ms)
        others = [
            (session.state.slo.tpot_ms, session.state.committed_len)
            for session in self._manager.sessions
            if not session.closing
        ]
        cached = len(request.tokens) + (request.max_new - request.generated) // 2
        load = Utilization.of(step_times.estimator, others).with_one_more(cached)
        if not request.slo.best_effort and load(request.slo.tpot_ms) > limit:
            self._refuse_speed(request.slo, load, limit)
        self._check_ttft(request, step_times.estimator, others)

    def _refuse_speed(self, slo: Slo, load: Callable[[float], float], limit: float) -> None:
        slow, fast = max(_MAX_TPOT_MS, slo.tpot_ms), slo.tpot_ms
        if load(slow) > limit:
            raise Refused(
                "busy",
                "The server is full: it can guarantee no token speed now.",
                "Retry later, or omit --slo.",
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
            f"The server cannot guarantee {slo.tokens_per_s:g} tokens/s now; "
            f"{nearest:g} tokens/s is possible.",
            f"Request --slo {nearest:g}, or omit --slo.",
            retry_ms=self._retry_ms(),
            nearest_tokens_per_s=nearest,
        )

    def _check_ttft(
        self,
        request: GenerationRequest,
        estimator: StepTimeEstimator,
        others: list[tuple[float, int]],
    ) -> None:
        if request.slo.ttft_ms is None:
            return
        chunk = self._settings.prefill_chunk
        backlog = len(request.tokens) + sum(
            one.state.prompt_left for one in self._manager.sessions if not one.closing
        )
        batch = estimator.start()
        for _, cached in others:
            batch = batch.add(1, cached)
        step_ms = batch.add(min(chunk, backlog), len(request.tokens) // 2, True).p50_ms
        needed_ms = math.ceil(backlog / chunk) * step_ms
        if needed_ms > request.slo.ttft_ms:
            raise Refused(
                "slo",
                f"The server cannot guarantee a first token within {request.slo.ttft_ms:,.0f} ms "
                f"now; {needed_ms:,.0f} ms is possible.",
                "Request that time, or retry later.",
                retry_ms=self._retry_ms(),
            )

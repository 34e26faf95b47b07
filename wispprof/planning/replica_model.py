"""A closed model of one server under open arrivals: from which load on a device class misses its SLO.

Sessions in progress follow from Little's law, a session's speed from the step time, and the step time from
the sessions, iterated to a fixed point. Prompts share the steps. The model says where a search by simulation
begins, and ranks candidates. It decides nothing alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from wispprof.planning.session_speed import Runs, renewal
from wispprof.simulation.devices import DeviceProfile
from wispprof.simulation.scenario import ServerModel
from wispprof.types import Slo

_ITERATIONS = 60
_TOLERANCE = 1e-3
_SLOW_SESSION = 0.93
"""Speed of a session at the violation quantile, of the mean."""
_SLOW_PROMPT = 2.0
"""First token of a session at the violation quantile, of the mean."""
_KV_SHARE = 0.9
_SPECEDGE_GROUPS = 2
_CHUNK = 512


@dataclass(frozen=True)
class ClassLoad:
    """Requests of one class in the whole fleet: rate, mean lengths, and who drafts."""

    name: str
    per_s: float
    prompt: float
    output: float
    reused: float
    device: DeviceProfile
    rtt_ms: float
    slo: Slo
    runs: Runs


@dataclass(frozen=True, slots=True)
class Steady:
    """A server's steady state. By class: tokens/s and ms to the first token. ``kv_tokens``: held on average.

    ``step_ms`` is infinite if the load has no steady state.
    """

    step_ms: float
    speeds: tuple[float, ...] = ()
    first_ms: tuple[float, ...] = ()
    sessions: float = 0.0
    kv_tokens: float = 0.0


DRAFT_LENGTHS = {
    "server-only": (0,),
    "server-spec": (0,),
    "sled": (5,),
    "specedge": (5,),
    "wisp": (2, 3, 4, 6),
    "wispprof": (0, 1, 2, 3, 5, 8),
}
"""Draft lengths that the model tries for each system."""
SYSTEM_NAMES = tuple(DRAFT_LENGTHS)


@dataclass
class ReplicaModel:
    """One server under one system, for any share of the fleet's load."""

    server: ServerModel
    system: str
    classes: Sequence[ClassLoad]
    _steps: dict[tuple[int, int, int], float] = field(default_factory=dict, repr=False)

    def servers_needed(self, most: int = 4096) -> int:
        """The fewest servers that hold every class's SLO, 0 if no number does."""
        if not self.holds(self.best(most)):
            return 0
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.holds(self.best(middle)) else (middle, high)
        return high

    def holds(self, state: Steady) -> bool:
        """Whether every class meets its SLO and the caches fit."""
        kv_tokens = self.server.kv_tokens or math.inf
        return (
            math.isfinite(state.step_ms)
            and state.kv_tokens <= _KV_SHARE * kv_tokens
            and all(
                _SLOW_SESSION * speed >= of.slo.tokens_per_s
                and _SLOW_PROMPT * first <= (of.slo.ttft_ms or math.inf)
                for of, speed, first in zip(self.classes, state.speeds, state.first_ms, strict=True)
            )
        )

    def best(self, servers: int) -> Steady:
        """The state with the draft length that leaves the slowest class most above its SLO."""

        def margin(state: Steady) -> float:
            if not state.speeds:
                return 0.0
            pairs = zip(self.classes, state.speeds, strict=True)
            return min(speed / of.slo.tokens_per_s for of, speed in pairs)

        states = [self.steady(1.0 / servers, k) for k in DRAFT_LENGTHS[self.system]]
        return max(states, key=lambda state: (self.holds(state), margin(state)))

    def steady(self, share: float, k: int) -> Steady:
        """The state under a share of the load, with ``k`` drafts a round or step."""
        token_ms = self._prompt_token_ms()
        prompts = sum(of.per_s * share * of.prompt * (1.0 - of.reused) for of in self.classes)
        busy = prompts * token_ms / 1000.0
        if busy >= 0.95:
            return Steady(math.inf)
        step_ms = self._step_ms(1.0, 1.0, 0) + self.server.overhead_ms
        lengths = [of.runs.lengths().tolist() for of in self.classes]
        state = Steady(math.inf)
        for _ in range(_ITERATIONS):
            speeds, firsts, counts, items, rows, held = [], [], [], 0.0, 0.0, 0.0
            for of, runs in zip(self.classes, lengths, strict=True):
                round_ms, commits, fed = self._round(of, runs, k, step_ms, items)
                speed = 1000.0 * commits / round_ms
                first = of.rtt_ms + 1.5 * step_ms
                first += of.prompt * (1.0 - of.reused) * token_ms / (1.0 - busy)
                count = of.per_s * share * (first / 1000.0 + of.output / speed)
                taken = count * min(1.0, step_ms / round_ms)
                items += taken
                rows += taken * fed
                held += count * (of.prompt + of.output / 2)
                speeds.append(speed)
                firsts.append(first)
                counts.append(count)
            sessions = sum(counts)
            if sessions > 50_000 or step_ms > 1e5:
                return Steady(math.inf)
            state = Steady(step_ms, tuple(speeds), tuple(firsts), sessions, held)
            cached = round(held / max(sessions, 1e-9))
            target = self._step_ms(max(1.0, items), rows / max(items, 1e-9), cached)
            target = (target + self.server.overhead_ms) / (1.0 - busy)
            if abs(target - step_ms) <= _TOLERANCE * step_ms:
                break
            step_ms += 0.5 * (target - step_ms)
        return state

    def _round(
        self, of: ClassLoad, runs: list[float], k: int, step_ms: float, others: float
    ) -> tuple[float, float, float]:
        """(ms between commits, tokens per commit, rows in a step) of a session."""
        if self.system == "server-spec":
            draft = self.server.draft
            k = draft.best_k(self.server.estimator, max(1, round(others) or 1), round(of.prompt))
            ms = step_ms + draft.added_ms(k, max(1, round(others)))
            return ms, 1.0 + sum(draft.cum_acceptance[:k]), 1.0 + k
        if not k:
            return step_ms, 1.0, 1.0
        draft_ms = of.device.step_ms(round(of.prompt + of.output / 2))
        if self.system == "wispprof":
            tokens, rows = renewal(runs, step_ms, k, draft_ms, of.rtt_ms)
            return step_ms, tokens, rows
        away = k * draft_ms + of.device.resume_ms + of.rtt_ms
        commits = 1.0 + sum(of.runs.cumulative[:k])
        if self.system == "specedge":
            return max(away + step_ms, _SPECEDGE_GROUPS * step_ms), commits, 1.0 + k
        return away + 1.5 * step_ms, commits, 1.0 + k

    def _prompt_token_ms(self) -> float:
        start = self.server.estimator.start()
        # Beside a running step, whose fixed part is paid anyway.
        beside = start.add(1, _CHUNK)
        return max(0.0, beside.add(_CHUNK, _CHUNK, True).p50_ms - beside.p50_ms) / _CHUNK

    def _step_ms(self, items: float, rows: float, cached: int) -> float:
        """Median step, linear between whole numbers of items and rows."""
        low, width = int(items), max(1, int(rows))
        part, more = items - low, max(0.0, rows - width)
        ms = self._uniform(low, width, cached)
        if part:
            ms += part * (self._uniform(low + 1, width, cached) - ms)
        if more:
            ms += more * (self._uniform(low, width + 1, cached) - self._uniform(low, width, cached))
        return ms

    def _uniform(self, items: int, new: int, cached: int) -> float:
        step = max(1, 1 << max(0, cached.bit_length() - 5))
        key = (items, new, cached // step * step)
        if key not in self._steps:
            batch = self.server.estimator.start().add_all([new] * items, [key[2]] * items)
            self._steps[key] = batch.p50_ms
        return self._steps[key]


def classes_of_tightness(classes: Iterable[ClassLoad], state: Steady) -> str:
    """The class with the least margin of speed."""
    pairs = zip(classes, state.speeds, strict=False)  # no speeds without a steady state
    return min(((speed / of.slo.tokens_per_s, of.name) for of, speed in pairs), default=(0.0, ""))[1]
